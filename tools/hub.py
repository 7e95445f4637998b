"""Upload a run to the Hugging Face hub, in every format that can hold its model.

    hf auth login                                               once, with a token that may write
    python -m tools.hub push out/tinystories USER/stories-30m   a model repository: page, ONNX, and for a GPT-2 more
    python -m tools.hub push out/quickstart USER/stories --space    a static Space: the page that generates stories

A new repository is private unless --public is given.
"""

import storygpt  # noqa: F401  (first: it prepares the process for importing torch)

import shutil
import tempfile
from pathlib import Path

from storygpt.system.errors import Parser, UserError, exit_with_one_line
from tools.export import FORMATS, export
from tools.formats import NotExportable, SavedModel
from tools.formats.hf_folder import library_errors_as_user_errors, silence_transformers, to_hf_tokenizer
from tools.formats.model_card import model_card, trained_on
from tools.formats.page import write_page

EXAMPLE = Path(__file__).parent.parent / "docs/sample_onnx.py"
SPACE_CARD = """---
title: "{name}"
sdk: static
app_file: index.html
---

A language model that generates stories in the browser. Training data: {data}.
"""


@exit_with_one_line
def main(argv=None):
    """Push a run. `argv`: the command line, by default sys.argv's."""
    parser = Parser(prog="python -m tools.hub", description="Upload a run to the Hugging Face hub.")
    parser.add_argument("command", choices=["push"], metavar="push")
    parser.add_argument("run", metavar="RUN", help="the run's folder, such as out/quickstart")
    parser.add_argument("name", metavar="USER/NAME", help="the repository; USER may be an organization")
    parser.add_argument("--space", action="store_true", help="make it a static Space with the page that generates "
                        "stories, instead of a model repository")
    parser.add_argument("--public", action="store_true", help="make the repository public (default: a new one is "
                        "private, an existing one stays as it is)")
    args = parser.parse_args(argv)
    push_run(args.run, args.name, "space" if args.space else "model", args.public)


def push_run(out_dir, name, kind, public):
    """Upload a run to the hub repository `name`, USER/NAME, in one commit, and print its URL. `kind`: model or space.

    A new repository is private unless `public`; an existing one keeps its visibility, but `public` makes it public
    after the upload. Raises UserError if the run cannot be exported, or the hub cannot be reached or refuses.
    """
    silence_transformers()
    from huggingface_hub import HfApi
    from huggingface_hub.utils import enable_progress_bars, validate_repo_id

    if "/" not in name:
        raise UserError(f"{name!r} is not the name of a hub repository: give USER/NAME, for example USER/{name}")
    api = HfApi()
    with library_errors_as_user_errors(f"push to {name}"):
        validate_repo_id(name)
        api.whoami()  # a missing or wrong token is reported before the export
    saved = SavedModel.load(out_dir)
    with tempfile.TemporaryDirectory() as temporary:
        {"model": write_model_files, "space": write_space_files}[kind](Path(temporary), saved, name)
        with library_errors_as_user_errors(f"push to {name}, with a token that must be allowed to write there"):
            enable_progress_bars()  # of the upload
            options = {"space_sdk": "static"} if kind == "space" else {}
            url = api.create_repo(name, private=not public, exist_ok=True, repo_type=kind, **options)
            api.upload_folder(repo_id=name, repo_type=kind, folder_path=temporary,
                              commit_message=f"Upload {saved.describe()}")
            private = api.repo_info(name, repo_type=kind).private
            if private and public:
                api.update_repo_settings(name, private=False, repo_type=kind)
    print(f"pushed {saved.describe()}; the repository is {'private' if private and not public else 'public'}: {url}")


def write_model_files(folder, saved, name):
    """Write what a model repository contains: every format that can hold the model, the tokenizer and the card.

    Prints why a format cannot. Raises UserError if none can.
    """
    refusals = []
    for extension, (write, dtypes) in FORMATS.items():
        target = folder / f"{name.split('/')[1]}{extension}"
        try:
            export(saved, target, write, dtypes[0])
        except NotExportable as error:
            refusals.append(error)
            print(f"without {extension or 'safetensors'}: {error}")
            continue
        if target.is_dir():  # that of transformers, whose files belong to the top of a repository
            for path in target.iterdir():
                path.rename(folder / path.name)
            target.rmdir()
    if len(refusals) == len(FORMATS):
        raise refusals[0]
    to_hf_tokenizer(saved.tokenizer, saved.model.config.block_size).save_pretrained(folder)
    shutil.copy(EXAMPLE, folder)
    card = model_card(name, saved, sorted(path.name for path in folder.iterdir()))
    Path(folder, "README.md").write_text(card, encoding="utf-8")


def write_space_files(folder, saved, name):
    """Write what a static Space contains: the page and the Space's settings."""
    write_page(folder / "index.html", saved, "int8")
    card = SPACE_CARD.format(name=name.split("/")[1], data=trained_on(saved.state))
    Path(folder, "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
