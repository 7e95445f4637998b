"""Export the best checkpoint of a run to a file or folder that other programs open. The extension selects the format.

    python -m tools.export out/quickstart stories.html      a web page that generates stories
    python -m tools.export out/quickstart stories.onnx      a file for ONNX Runtime (docs/sample_onnx.py)
    python -m tools.export out/tinystories stories.gguf     a file for llama.cpp, Ollama, LM Studio: only a GPT-2
    python -m tools.export out/tinystories stories-30m      a folder for transformers, vLLM: only a GPT-2

It is written only if the exported model gives the run's logits. docs/sharing.md compares the formats.
"""

import storygpt  # noqa: F401  (first: it prepares the process for importing torch)

import tempfile
from pathlib import Path

from storygpt.system import files
from storygpt.system.errors import Parser, UserError, exit_with_one_line
from tools.formats import SavedModel
from tools.formats.gguf_file import write_gguf, write_modelfile
from tools.formats.hf_folder import write_hf_folder
from tools.formats.onnx_file import write_onnx
from tools.formats.page import write_page

# By extension: the function that writes the format, and the dtypes of its matrices, the default first.
FORMATS = {
    ".html": (write_page, ("int8", "float32")),
    ".onnx": (write_onnx, ("float32", "int8")),
    ".gguf": (write_gguf, ("f16", "bf16", "q8_0")),
    "": (write_hf_folder, ("float32",)),
}


@exit_with_one_line
def main(argv=None):
    """Export a run. `argv`: the command line, by default sys.argv's."""
    args = parse_args(argv)
    targets = [args.target, *([args.target.with_suffix(".Modelfile")] if args.modelfile else [])]
    for path in targets:
        if path.exists():
            raise UserError(f"{path} already exists: remove it or choose another name")
    saved = SavedModel.load(args.run)
    write, dtypes = FORMATS[args.target.suffix.lower()]
    note = export(saved, args.target, write, args.dtype or dtypes[0])
    if args.modelfile:
        write_modelfile(targets[1], args.target, saved.model.config.block_size)
    print(f"{args.target}: exported {saved.describe()}{note}")


def parse_args(argv):
    """Parse the command line; exits with code 2 for an unknown extension, or a flag that is not one of the format's."""
    parser = Parser(prog="python -m tools.export", description="Export a run to a file or folder for other programs.")
    parser.add_argument("run", metavar="RUN", help="the run's folder, such as out/quickstart")
    parser.add_argument("target", metavar="TARGET", type=Path, help="NAME.html: a web page; NAME.onnx: for ONNX "
                        "Runtime; NAME.gguf: for llama.cpp; NAME: a folder for transformers")
    dtypes = (f"{extension or 'folder'}: {', '.join(dtypes)}" for extension, (_, dtypes) in FORMATS.items())
    parser.add_argument("--dtype", help=f"of the matrices; {'; '.join(dtypes)} (default: the first)")
    parser.add_argument("--modelfile", action="store_true", help=".gguf: also write NAME.Modelfile for Ollama")
    args = parser.parse_args(argv)
    extension = args.target.suffix.lower()
    if extension not in FORMATS:
        parser.error(f"{args.target} ends in {extension}: use .html, .onnx or .gguf, or no dot in the name of a folder")
    dtypes = FORMATS[extension][1]
    if args.dtype and args.dtype not in dtypes:
        parser.error(f"--dtype {args.dtype} is not a dtype of {args.target}: use {' or '.join(dtypes)}")
    if args.modelfile and extension != ".gguf":
        parser.error(f"--modelfile has no effect on {args.target}: it is for .gguf files")
    return args


def export(saved, target, write, dtype):
    """Write a SavedModel as the file or folder `target`, atomically, with a function of FORMATS.

    Returns that function's note on the export, for the terminal. Raises UserError if the model cannot be exported or
    the target cannot be written.
    """
    existing = next(folder for folder in target.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryDirectory(dir=existing) as temporary:
            partial = Path(temporary, target.name)
            note = write(partial, saved, dtype)
            target.parent.mkdir(parents=True, exist_ok=True)
            files.rename(partial, target)
    except OSError as error:  # which names a file in the temporary folder
        raise UserError(f"cannot write {target} ({error})") from error
    return note


if __name__ == "__main__":
    main()
