"""A local web page (tools/serve.html) to generate stories and see the probability of each token and its alternatives.

    python -m tools.serve                    http://127.0.0.1:8000, with every run under out/
    python -m tools.serve --port 8001

A second tab plots the losses of the runs while they train, and shows the story of each evaluation.

The page requests a story with POST /generate and receives one line of JSON for each token. There is no access control:
everyone who can reach the port can use it. Without --host, only this machine can.
"""

import storygpt  # noqa: F401  (first: it prepares the process for importing torch)

import asyncio
import functools
import itertools
import json
import math
import os
import socket
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import torch

from sample import number
from storygpt.checkpoint import load_model
from storygpt.generate import generate, prepare_for_generation
from storygpt.run import best_checkpoint, list_runs, newest_run
from storygpt.system.errors import Parser, UserError, exit_with_one_line
from storygpt.system.hardware import pick_device, pick_inference_dtype
from tools import compare, publish

LOOPBACK = ("127.0.0.1", "localhost")
MAX_PROMPT = 10_000  # characters
SHOWN = ("iter", "tokens", "seconds", "train_loss", "val_loss", "val_bpb")  # of an evaluation
TOP_TOKENS = 5  # most likely tokens that are shown with their probabilities
# The settings of a request: name → type, minimum, maximum, default. JavaScript numbers are exact up to 2**53.
LIMITS = {"temperature": (float, 0, 100, 0.8), "top_k": (int, 0, 10**9, 200), "top_p": (float, 1e-9, 1, 1.0),
          "max_new_tokens": (int, 1, 2000, 400), "seed": (int, 0, 2**53 - 1, 0)}
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Content-Security-Policy": (
    "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")}


@exit_with_one_line
def main(argv=None):
    """Serve the page until Ctrl-C. `argv`: the command line, by default sys.argv's."""
    args = parse_args(argv)
    import uvicorn
    app = make_app(pick_device(args.device), args.host, lambda: server.should_exit)
    server = uvicorn.Server(uvicorn.Config(app, ws="none", log_level="warning", timeout_graceful_shutdown=1))
    newest_run()  # raises UserError if there is no run
    try:
        listener = socket.create_server((args.host, args.port))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno > 0 else error.strerror  # below 0: unknown host name
        raise UserError(f"cannot listen on {args.host}, port {args.port} ({reason}): use another --port (0: any free "
                        "one) or --host") from error
    print(f"http://{args.host}:{listener.getsockname()[1]}  (press Ctrl-C to stop)", flush=True)
    if args.host not in LOOPBACK:
        print(f"note: everyone who can reach {args.host} can use this page, and traffic is not encrypted", flush=True)
    server.run(sockets=[listener])


def parse_args(argv):
    """Parse the command line. Exits with code 2 if it is wrong."""
    parser = Parser(prog="python -m tools.serve", description="A local web page to generate stories with runs in out/.")
    parser.add_argument("--port", type=number(int, 0, 65535, "from 0 to 65535"), default=8000,
                        help="0: any free port (default: %(default)s)")
    parser.add_argument("--host", default=LOOPBACK[0],
                        help="address to listen on; 0.0.0.0: the whole network can connect (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    return parser.parse_args(argv)


def make_app(device, host=LOOPBACK[0], stopping=lambda: False):
    """The web application (ASGI): the page, the names, losses and samples of the runs, stories generated on `device`.

    Stories stop early once `stopping()` is true.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import FileResponse, JSONResponse, StreamingResponse
    from starlette.routing import Route

    # How many stories are generated at once, the others wait: two on a CPU, each at half the speed. Elsewhere one, as
    # another thread would break the capture of a CUDA graph, and MPS does not support two (pytorch issue 197805).
    slots = asyncio.Semaphore(2 if device.type == "cpu" else 1)

    async def page(request):
        return FileResponse(Path(__file__).with_name("serve.html"), headers=HEADERS)

    async def runs(request):
        return JSONResponse({"runs": await run_in_threadpool(run_names)}, headers=HEADERS)

    async def losses(request):
        return JSONResponse(await run_in_threadpool(read_losses), headers=HEADERS)

    async def sample(request):
        run, iteration = map(request.query_params.get, ("run", "iteration"))
        try:
            return JSONResponse({"story": await run_in_threadpool(read_sample, run, iteration)}, headers=HEADERS)
        except (UserError, OSError) as error:
            return JSONResponse({"error": str(error)}, 400, HEADERS)

    async def story(request):
        try:
            settings = check_request(await read_json(request), await run_in_threadpool(run_names))
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400, HEADERS)
        return StreamingResponse(stream(settings), media_type="application/x-ndjson", headers=HEADERS)

    async def stream(settings):
        try:  # Starlette cancels this at an await if the client disconnects
            async with slots:
                # Closed as soon as the client disconnects, not later by the garbage collector: on a GPU the story
                # owns a CUDA graph, which must not be freed while the next story has one (PyTorch issue 193402).
                with closing(story_events(device, **settings)) as events:
                    while not stopping() and (event := await run_in_threadpool(next, events, None)):
                        yield json.dumps(event) + "\n"
        except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            yield json.dumps({"error": str(error)}) + "\n"

    # Rejects requests of other web sites whose host name resolves to this address (DNS rebinding).
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK if host in LOOPBACK else ["*"])
    return Starlette(middleware=[hosts], routes=[
        Route("/", page), Route("/runs", runs), Route("/losses", losses), Route("/sample", sample),
        Route("/generate", story, methods=["POST"])])


async def read_json(request):
    """The JSON body of a request. Raises UserError if it is too long or not JSON."""
    content_type = request.headers.get("content-type", "").split(";")[0]
    if content_type != "application/json":  # browsers do not let pages of other sites send this type
        raise UserError("the request is not application/json")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > 16 * MAX_PROMPT:  # a character is at most 12 bytes of JSON
            raise UserError(f"the request is too long: a prompt has at most {MAX_PROMPT:,} characters")
    try:
        return json.loads(body)
    except ValueError as error:
        raise UserError("the request is not JSON") from error


def check_request(request, runs):
    """The keyword arguments for `story_events` from a request's JSON, with defaults filled in.

    Raises UserError for unknown keys, wrong types and values out of range.
    """
    if not isinstance(request, dict) or request.keys() - {"run", "prompt", *LIMITS}:
        raise UserError(f"a request may only have run, prompt, {', '.join(LIMITS)}")
    run, prompt = request.get("run"), request.get("prompt", "")
    check_run(run, runs)
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
        raise UserError(f"the prompt is not a text of at most {MAX_PROMPT:,} characters")
    prompt = prompt.encode("utf-8", "replace").decode()  # JSON strings can contain lone surrogates
    values = {}
    for name, (kind, low, high, default) in LIMITS.items():
        value = request.get(name)
        if value is not None and not (type(value) in (int, kind) and low <= value <= high):
            raise UserError(f"{name} = {value!r} is not {'an integer' if kind is int else 'a number'} from {low} to "
                            f"{high}")
        values[name] = default if value is None else kind(value)
    return {"run": run, "prompt": prompt, **values}


def check_run(run, runs):
    """Raise UserError if a request's run is not one of these names, so that no other folder is ever read."""
    if run not in runs:
        raise UserError(f"there is no run {run!r} under out/")


def run_names():
    """The names of the runs under out/ that have a checkpoint, newest first."""
    return [folder.relative_to("out").as_posix() for folder in list_runs()]


def read_losses():
    """The evaluations of all runs under out/ that have a log, the newest run first, as a dict for the page.

    `loss` is the key of the loss that can be compared; `notes` say what cannot, and which logs are damaged.
    """
    runs, notes = [], []
    for name in run_names():
        try:
            run = compare.read_run(str(Path("out", name)))
            evals = [{key: record[key] for key in SHOWN} for record in run["evals"]
                     if math.isfinite(record["val_loss"] + record["train_loss"])]  # JSON has no infinity and no NaN
            runs.append(run | {"name": name, "evals": evals})
        except compare.NoLogYet:
            pass  # an imported model, or a run that is just being replaced
        except (UserError, OSError) as error:
            notes.append(str(error))
    return {"loss": "val_loss" if compare.have_same_data(runs) else "val_bpb",
            "notes": [*notes, *compare.comparability_warnings(runs)],
            "runs": [{"name": run["name"], "evals": run["evals"]} for run in runs]}


def read_sample(run, iteration):
    """The story of a run at its evaluation at this iteration (a text), None if there is none (yet).

    Raises UserError if the run is not listed.
    """
    check_run(run, run_names())
    with suppress(FileNotFoundError):
        return publish.read_stories(Path("out", run)).get(iteration)


load_lock = threading.Lock()  # prevents two stories from loading the same run twice


@functools.lru_cache(maxsize=2)  # the page compares up to two runs
def load(path, modified, device):
    """Load a checkpoint for generating one story at a time on `device`: model, tokenizer, facts for the page.

    `modified` (the file's modification time) only makes the cache load a newer checkpoint again.
    """
    model, tokenizer, state = load_model(path)
    facts = {"parameters": model.num_parameters(), "training_tokens": state["tokens"],
             "block_size": model.config.block_size, "val_loss": state["metrics"].get("val_loss")}
    dtype = pick_inference_dtype("auto", device, model.num_parameters())
    return prepare_for_generation(model, device, dtype), tokenizer, facts


def story_events(device, run, prompt, seed, max_new_tokens, **sampling):
    """Generate a story with a run, yielding dicts for the page: facts about the model, each token, how it ended."""
    path = best_checkpoint(Path("out", run))
    with load_lock:
        model, tokenizer, facts = load(path, path.stat().st_mtime_ns, device)
    prompt_tokens = tokenizer.encode(prompt)
    yield {"model": facts, "seed": seed, "prompt_tokens": len(prompt_tokens)}
    idx = torch.tensor([[tokenizer.end_of_text, *prompt_tokens]], device=device)  # (1, T); as in training
    steps = generate(model, idx, max_new_tokens, generator=torch.Generator(device).manual_seed(seed),
                     end_of_text=tokenizer.end_of_text, with_logits=True, **sampling)
    steps = ((int(token), probabilities(int(token), logits[0], tokenizer)) for token, logits in steps)
    steps, copy = itertools.tee(steps)  # for the probabilities and for the text
    pieces = tokenizer.stream(itertools.takewhile(lambda token: token != tokenizer.end_of_text, (t for t, _ in copy)))
    started = time.perf_counter()
    for count, (token, probs) in enumerate(steps, 1):
        ended = token == tokenizer.end_of_text
        if ended:
            break
        yield {"text": next(pieces), **probs}
    end = {"end": "story", **probs} if ended else {"end": "length"}
    # The last piece of text is an incomplete character, if any.
    yield {**end, "text": next(pieces), "tokens": count, "seconds": time.perf_counter() - started}


def probabilities(token, logits, tokenizer):
    """A token's probability and rank and the TOP_TOKENS most likely tokens, from the model's logits (V,).

    They are those before temperature, top-k and top-p.
    """
    probs = logits.float().softmax(-1)  # (V,)
    top = probs.topk(TOP_TOKENS)

    def to_text(token):
        return None if token == tokenizer.end_of_text else tokenizer.decode([token])

    # Equal probabilities are common in bfloat16: the rank must agree with the order of the top tokens.
    top_tokens = top.indices.tolist()
    rank = top_tokens.index(token) if token in top_tokens else max(int((probs > probs[token]).sum()), TOP_TOKENS)
    return {"p": probs[token].item(), "rank": rank + 1,
            "top": [[to_text(t), p] for t, p in zip(top_tokens, top.values.tolist())]}


if __name__ == "__main__":
    main()
