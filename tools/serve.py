"""A local page to play with trained models, tools/serve.html: stories stream in, and each token shows what else could
have stood in its place.

    python -m tools.serve                    http://127.0.0.1:8000, with every run under out/
    python -m tools.serve --port 8001

The page asks for a story with POST /tell and gets a line of JSON for each token. Whoever reaches the port can ask; only
with --host is that anyone but this machine.
"""

import argparse
import asyncio
import functools
import json
import os
import secrets
import socket
import threading
import time
from contextlib import closing
from pathlib import Path

import torch

import checkpoint
from errors import Parser, UserError, exit_with_one_line
from hardware import pick_device, pick_stories_at_once, pick_weights

LOOPBACK = ("127.0.0.1", "localhost")
LONGEST_PROMPT = 10_000  # characters
MOST_WAITING = 8  # stories being told or waiting for their turn
RUNNERS_UP = 5  # tokens that are shown with their probabilities
# What a request may ask for: name → type, lowest, highest, default. The seed is a number that JavaScript can hold.
LIMITS = {"temperature": (float, 0, 100, 0.8), "top_k": (int, 0, 10**9, 200), "top_p": (float, 1e-9, 1, 1.0),
          "max_new_tokens": (int, 1, 2000, 400), "seed": (int, 0, 2**53 - 1, None)}
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Content-Security-Policy": (
    "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")}


@exit_with_one_line
def main(argv=None):
    """Serve the page until Ctrl-C; `argv` as on the command line."""
    def port(text):
        if not 0 <= int(text) <= 65535:
            raise argparse.ArgumentTypeError(f"{text} is not from 0 to 65535")
        return int(text)

    parser = Parser(prog="python -m tools.serve", description="A local page to play with the runs under out/.")
    parser.add_argument("--port", type=port, default=8000, help="0: any that is free (default: %(default)s)")
    parser.add_argument("--host", default=LOOPBACK[0],
                        help="the address to listen at; 0.0.0.0: everyone on the network (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    args = parser.parse_args(argv)
    if not args.host:
        parser.error("--host is empty: 0.0.0.0 is every address of this machine")
    try:
        import uvicorn
        app = make_app(pick_device(args.device), args.host, lambda: server.should_exit)
    except ImportError as error:
        raise UserError("the page needs starlette and uvicorn:  pip install -r requirements-extra.txt") from error
    checkpoint.newest_run()  # or there is nothing to play with
    try:
        listening = socket.create_server((args.host, args.port))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno > 0 else error.strerror  # below 0: the name is not known
        raise UserError(f"cannot listen at {args.host}, port {args.port} ({reason}): give another --port (0: any that "
                        "is free) or --host") from error
    print(f"http://{args.host}:{listening.getsockname()[1]}  (Ctrl-C stops)", flush=True)
    if args.host not in LOOPBACK:
        print(f"note: whoever can reach {args.host} can ask for stories; the connection is not encrypted", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, limit_concurrency=100)
    server = uvicorn.Server(config)
    server.run(sockets=[listening])


def make_app(device, host=LOOPBACK[0], stopping=lambda: False):
    """The web application (ASGI): the page, the names of the runs, and stories told on a torch.device.

    A story ends where it is when `stopping()` is true.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    at_once = asyncio.Semaphore(pick_stories_at_once(device))
    waiting = 0

    async def page(request):
        return FileResponse(Path(__file__).with_name("serve.html"), headers=HEADERS)

    async def runs(request):
        return JSONResponse({"runs": await run_in_threadpool(names_of_runs)}, headers=HEADERS)

    async def ask(request):
        try:
            asked = check(await body_of(request), await run_in_threadpool(names_of_runs))
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400, HEADERS)
        except ClientDisconnect:  # in the middle of the request
            return Response()
        return StreamingResponse(lines(asked), media_type="application/x-ndjson", headers=HEADERS)

    async def lines(asked):
        nonlocal waiting
        if waiting >= MOST_WAITING:  # asked and counted in one step: many requests may come at once
            yield line({"error": f"{waiting} stories are being told already: try again when one has ended"})
            return
        waiting += 1
        try:  # Starlette ends it, at an await, when the reader has gone away
            async with at_once:
                # Closed as soon as the reader disconnects, not later by the garbage collector: on a GPU the story
                # holds a CUDA graph, which must not be freed while the next story has one (PyTorch issue 193402).
                with closing(tell(device, **asked)) as events:
                    while not stopping() and (event := await run_in_threadpool(next, events, None)):
                        yield line(event)
        except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            yield line({"error": str(error)})
        finally:
            waiting -= 1

    # A page from elsewhere, whose name has been turned to this address, must not get an answer.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK if host in LOOPBACK else ["*"])
    return Starlette(middleware=[hosts], routes=[
        Route("/", page), Route("/runs", runs), Route("/tell", ask, methods=["POST"])])


def line(event):
    """A dict as a line of JSON."""
    return json.dumps(event) + "\n"


async def body_of(request):
    """The JSON of a request. Raises UserError where it is too long, or not JSON."""
    kind = request.headers.get("content-type", "").split(";")[0]
    if kind != "application/json":  # a browser lets no page from elsewhere send this
        raise UserError("the request is not application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > 16 * LONGEST_PROMPT:  # a character is at most 12 bytes of JSON
            raise UserError(f"the request is too long: a prompt has at most {LONGEST_PROMPT:,} characters")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError("the request is not JSON") from error


def check(asked, runs):
    """A request's dict with defaults filled in. Raises UserError for what is unknown, of another type or out of bounds.
    """
    if not isinstance(asked, dict) or asked.keys() - {"run", "prompt", *LIMITS}:
        raise UserError(f"a request has run, prompt, {', '.join(LIMITS)}, and nothing else")
    run, prompt = asked.get("run"), asked.get("prompt", "")
    if run not in runs:
        raise UserError(f"there is no run {run!r} under out/")
    if not isinstance(prompt, str) or len(prompt) > LONGEST_PROMPT:
        raise UserError(f"the prompt is not a text of at most {LONGEST_PROMPT:,} characters")
    prompt = prompt.encode("utf-8", "replace").decode()  # JSON can hold halves of characters
    values = {}
    for name, (kind, low, high, default) in LIMITS.items():
        value = asked.get(name)
        if value is not None and not (type(value) in (int, kind) and low <= value <= high):
            raise UserError(f"{name} = {value!r} is not a {'whole ' * (kind is int)}number from {low} to {high}")
        values[name] = default if value is None else kind(value)
    if values["seed"] is None:
        values["seed"] = secrets.randbelow(2**32)
    return {"run": run, "prompt": prompt, **values}


def names_of_runs():
    """The names of the folders under out/ that have a checkpoint, the newest first."""
    return [folder.name for folder in checkpoint.runs()]


loading = threading.Lock()  # so that two stories do not load the same run twice


@functools.lru_cache(maxsize=2)  # as many as the page shows side by side
def load(path, modified, device):
    """The model of a checkpoint, ready to tell one story on a device, its tokenizer and the checkpoint's other figures.

    `modified`, the time at which the file was, makes a run that is still training load anew.
    """
    model, tokenizer, state = checkpoint.load_model(path)
    about = {"parameters": model.num_parameters(), "tokens_of_training": state["tokens"],
             "block_size": model.config.block_size, "val_loss": state["figures"].get("val_loss")}
    dtype = pick_weights("auto", device, 1)
    model = model.to_int8() if dtype == "int8" else model.to(device, dtype)
    return model, tokenizer, about


def tell(device, run, prompt, seed, max_new_tokens, **sampling):
    """Yield what the page needs of a story, as dicts: first about the model, then each token, at last how it ended."""
    path = checkpoint.best_in(Path("out", run))
    with loading:
        model, tokenizer, about = load(path, path.stat().st_mtime_ns, device)
    tokens = [tokenizer.end_of_text, *tokenizer.encode(prompt)]  # a story begins after an end of text
    yield {"about": about, "seed": seed, "prompt_tokens": len(tokens) - 1}
    generator = torch.Generator(device).manual_seed(seed)
    steps = model.generate(torch.tensor([tokens], device=device), max_new_tokens, generator=generator,
                           end_of_text=tokenizer.end_of_text, with_logits=True, **sampling)
    made, likely, end, started = 0, {}, None, time.perf_counter()

    def story():
        nonlocal made, likely, end
        for token, logits in steps:
            made, likely = made + 1, probabilities(int(token), logits[0], tokenizer)
            if int(token) == tokenizer.end_of_text:
                end = "story"
                return
            yield int(token)
        end, likely = "length", {}

    for text in tokenizer.stream(story()):  # a piece for each token, at last what was held back of half a character
        if end:
            yield {"end": end, "text": text, **likely, "tokens": made, "seconds": time.perf_counter() - started}
        else:
            yield {"text": text, **likely}


def probabilities(token, logits, tokenizer):
    """What the model gave a token and the likeliest ones, from its logits (V): before temperature, top-k and top-p."""
    probs = logits.float().softmax(-1)  # (V)
    best = probs.topk(RUNNERS_UP)

    def spelt(token):
        return None if token == tokenizer.end_of_text else tokenizer.decode([token])

    # Equal ones are common in bfloat16: a token that is among the likeliest has its place there, others come behind.
    likeliest = best.indices.tolist()
    rank = likeliest.index(token) if token in likeliest else max(int((probs > probs[token]).sum()), RUNNERS_UP)
    return {"p": probs[token].item(), "rank": rank + 1,
            "likeliest": [[spelt(t), p] for t, p in zip(likeliest, best.values.tolist())]}


if __name__ == "__main__":
    main()
