"""`sslvit <command> ...`, the same as `accelerate launch -m sslvit <command> ...`. Parse, call, print.

Importing torch takes seconds. So a command reads its arguments first, and help is made without importing its module.
"""

import ast
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from . import __version__
from .arguments import flatten, help_lines, parse, recipes, split_own
from .errors import UserError, did_you_mean, printable
from .evaluation import commands as evaluations
from .stopping import EXIT_REQUEUE, Stopped

BEGAN = time.monotonic()  # from where the minutes of a command count
HELP = ("-h", "--help", "help")
RECIPE = "[recipe] [images] [key=value ...]"
Command = Callable[[list[str]], int | None]
# Modules of sslvit/tools/ with run(run_config, config, arguments). The keys of all commands are in a config.py.
TOOLS = {
    "data": ("data_report", RECIPE, "what images are like: sizes, broken ones, duplicates, mean, crops"),
    "bench": ("bench", RECIPE, "how fast this machine runs a recipe, and what to change first"),
    "submit": ("submit", RECIPE, "pretrain as a job of a SLURM cluster, queued again until it is done"),
}
# Modules with run(config).
PLAIN = {
    "export": ("export", "run=... to=timm,hf,onnx,torch out=<folder>", "write the encoder in forms that others load"),
    "embed": ("tools.embed", "run=... data=... out=<file>", "features of all images: .parquet, .npy or .faiss"),
    "inspect": ("inspection", "run=... out=inspect.html", "what an encoder has learned, block by block, as one page"),
    "search": ("tools.search", "index=<file> image=...", "nearest images; duplicates; a diverse subset"),
}
# Modules with a function of the command's name, which takes runs and the keys.
RUNS = {
    "compare": ("evaluation.compare", "<run> <run> ...", "results of runs side by side, with the intervals of the "
                "differences"),
    "report": ("report", "<run or folder> ... out=report.html", "one page that says whether runs learn, with pictures"),
    "watch": ("report.watch", "<run or folder> ...", "the same page in a browser, while the runs go on"),
}  # fmt: skip
KEYS = "Keys with their defaults; a key may be given by its last name alone:"


def usage() -> str:
    """The list of commands."""
    rows = [
        ("pretrain", RECIPE, "train an encoder on unlabeled images"),
        *((name, command.usage, command.help) for name, command in evaluations().items()),
        *((name, *row[1:]) for name, row in (RUNS | PLAIN | TOOLS).items()),
        ("completion", "bash, zsh or fish", "a script with which the shell completes commands and keys"),
        ("recipes", "", "the recipes that come with sslvit, for pretrain, data, bench and submit"),
    ]
    return (
        "sslvit <command> [arguments]\n\n"
        + "".join(f"  {name:<11}{arguments:<39}  {text}\n" for name, arguments, text in rows)
        + "\n`sslvit <command> --help` lists the keys of a command. On several GPUs: accelerate launch -m sslvit "
        "<command> ...\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after a mistake of the user or for a file that cannot be used (one sentence, no traceback),
    or 75 for a run that was asked to stop and goes on when the same command is started again."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in HELP:
        print(usage(), end="")
        return 0
    if arguments[0] == "--version":
        print(f"sslvit {__version__}")
        return 0
    command, *rest = arguments
    try:
        return find(command)(rest) or 0
    except (UserError, OSError, Stopped, RuntimeError, KeyboardInterrupt) as error:
        return _say_why(command, error)


def _say_why(command: str, error: BaseException) -> int:
    """The exit status of a command that has ended with an error, after a sentence. Raises the error again if there is
    nothing that the user could mend."""
    if isinstance(error, UserError):
        print(printable(f"sslvit {command}: {error}", keep="\n"), file=sys.stderr)
        return 2
    if isinstance(error, BrokenPipeError):  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
        return 1
    if isinstance(error, OSError) and isinstance(error.filename, str):  # about a file that the user can mend
        print(f"sslvit {command}: {error.filename} cannot be read or written: {error.strerror}.", file=sys.stderr)
        return 2
    if isinstance(error, Stopped):
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{error} Start the same command to go on (exit status {EXIT_REQUEUE}).")
        return EXIT_REQUEUE
    if isinstance(error, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
        return 130
    if isinstance(error, RuntimeError):
        return _lost_process(command, error)
    raise error


def _lost_process(command: str, error: RuntimeError) -> int:
    """Say that another process has ended, in any command; raise the error again if it is something else."""
    from .distributed import explain_lost_process

    explanation = explain_lost_process(error)
    if explanation is None:
        raise error
    print(f"sslvit {command}: {explanation}", file=sys.stderr)
    return 2


def find(command: str) -> Command:
    """The function behind a command. Raises UserError with the nearest name."""
    if command in COMMANDS:
        return COMMANDS[command]
    if command in evaluations():
        return partial(_evaluate, command)
    names = [*COMMANDS, *evaluations()]
    raise UserError(f"there is no command {command}.{did_you_mean(command, names)} Commands: {', '.join(names)}.")


def _help(arguments: list[str]) -> bool:
    return any(argument in HELP for argument in arguments)


def _pretrain(arguments: list[str]) -> None:
    from . import config

    if _help(arguments):
        print(f"sslvit pretrain {RECIPE}\n")
        print(config.help_text([argument for argument in arguments if argument not in HELP]))
        return
    from . import settings

    began = BEGAN if sys.argv[2:] == arguments else time.monotonic()  # main() may be called late in a process
    chosen = settings.load(arguments, began)
    from .distributed import say
    from .pretraining import pretrain, summary

    result = pretrain(chosen, began)
    if result.stopped:
        raise Stopped(f"Stopped by {result.stopped} after step {result.steps}, which is saved in {result.run_dir}.")
    say(*summary(result))


def _evaluate(name: str, arguments: list[str]) -> None:
    if _help(arguments):
        _print_help(name, f"{evaluations()[name].usage} [key=value ...]", f"evaluation.{name}", KEYS)
    else:
        settings = parse(own_keys(name), arguments, name)
        import_module(f".evaluation.{name}", __package__).run(settings)


def evaluate(script: str) -> None:
    """What eval/<name>.py does: `sslvit <name>` with the arguments of the command line."""
    if multiprocessing.parent_process() is None:  # a worker process may import the script again
        sys.exit(main([Path(script).stem, *sys.argv[1:]]))


def _runs(name: str, arguments: list[str]) -> None:
    """A command that takes runs and keys of its own."""
    if _help(arguments):
        _print_help(name, f"{RUNS[name][1]} [key=value ...]", RUNS[name][0], "Keys with their defaults:")
        return
    runs = {word for word in arguments if os.path.lexists(re.sub("^(untrained|pixels):", "", word))}
    own = [word for word in arguments if "=" in word and word not in runs]
    settings = parse(own_keys(name), own, name)
    module = import_module(f".{RUNS[name][0]}", __package__)
    getattr(module, name)([word for word in arguments if word not in own], settings)


def _plain(name: str, arguments: list[str]) -> None:
    """A command with nothing but keys of its own."""
    if _help(arguments):
        _print_help(name, PLAIN[name][1], PLAIN[name][0], KEYS)
    else:
        settings = parse(own_keys(name), arguments, name)
        import_module(f".{PLAIN[name][0]}", __package__).run(settings)


def _tool(name: str, arguments: list[str]) -> None:
    """A command that takes the arguments of pretrain and some keys of its own."""
    from . import config

    module, defaults = f"tools.{TOOLS[name][0]}", own_keys(name)
    if _help(arguments):
        _print_help(name, RECIPE, module, "The arguments are those of sslvit pretrain, and these keys:")
        return
    own, rest = split_own(arguments, defaults, name)
    if asked := [word for word in rest if word.lstrip("-").startswith(("minutes=", "hours="))]:
        raise UserError(f"{asked[0]} is for `sslvit pretrain`: give {name} epochs=, steps= or images=.")
    settings = config.load(rest, name, vars(defaults)), parse(defaults, own, name)
    import_module(f".{module}", __package__).run(*settings, rest)


def _recipes(arguments: list[str]) -> None:
    """Names and first lines: `sslvit pretrain <name>`."""
    for name, path in recipes().items():
        print(f"  {name:<32}{path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")


def _completion(arguments: list[str]) -> None:
    from . import config
    from .tools import completion

    own = {
        name: list(flatten(OmegaConf.structured(own_keys(name)))) for name in (*evaluations(), *RUNS, *PLAIN, *TOOLS)
    }
    run = config.all_keys()
    words = {"pretrain": run, **own, **{name: own[name] + run for name in TOOLS}}
    short = {name: [key.rpartition(".")[2] for key in keys] for name, keys in words.items()}
    words = {name: [f"{key}=" for key in sorted({*keys, *short[name]})] for name, keys in words.items()}
    words = {name: [*(recipes() if name == "pretrain" or name in TOOLS else []), *keys] for name, keys in words.items()}
    print(completion.script(" ".join(arguments), words | {"recipes": [], "completion": list(completion.SHELLS)}))


def own_keys(command: str) -> Any:
    """The keys of a command, with their defaults: an instance of the class of its name in a config.py."""
    evaluation = command in (*RUNS, *evaluations(), "inspect")
    folder = "evaluation" if evaluation else command if command == "export" else "tools"
    return getattr(import_module(f".{folder}.config", __package__), command.title())()


def _print_help(command: str, usage: str, module: str, keys: str) -> None:
    place = Path(__file__).parent.joinpath(*module.split("."))
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    print(f"sslvit {command} {usage}\n\n{text}\n\n{keys}\n")
    print("\n".join(help_lines(own_keys(command))))


COMMANDS: dict[str, Command] = {
    "pretrain": _pretrain,
    "recipes": _recipes,
    "completion": _completion,
    **{name: partial(_runs, name) for name in RUNS},
    **{name: partial(_plain, name) for name in PLAIN},
    **{name: partial(_tool, name) for name in TOOLS},
}

if __name__ == "__main__":
    sys.exit(main())
