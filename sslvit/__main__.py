"""`sslvit <command> ...`, the same as `accelerate launch -m sslvit <command> ...`. Parse, call, print."""

import difflib
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from importlib import import_module
from pathlib import Path

from .errors import UserError
from .stopping import REQUEUE, Stopped
from .words import help_lines, parse

# Evaluations are modules of sslvit/evaluation/ with a Config and run(config): {name: (its words, what it is)}.
EVALUATIONS = {
    "knn": ("run=... data.train=... data.test=...", "k-NN classification with its frozen features"),
    "linear": ("run=... data.train=... data.test=...", "linear probe of its frozen features"),
    "logistic": ("run=... data.train=... data.test=...", "logistic regression on its frozen features"),
    "attentive": ("run=... data.train=... data.test=...", "attentive probe of its frozen patch tokens"),
    "finetune": ("run=... data.train=... data.test=...", "train all of it with labels, by a published recipe"),
    "quality": ("run=... data=...", "rank, uniformity and alignment of its features, without labels"),
    "retrieval": ("run=... data.train=... [data.test=...]", "which images it finds alike: mAP, recall, precision"),
    "cluster": ("run=... data=...", "clusters of its features beside the classes: NMI, ARI, accuracy"),
    "robustness": ("run=... data.train=... data.test=...", "its linear probe on corrupted and attacked images"),
    "segment": ("run=... data.train=... data.test=...", "a linear classifier of its patches: mean IoU"),
    "attention": ("run=... data=... picture=...", "a picture of its attention and of its patch features"),
}
RECIPE = "[recipe.yaml] [images] [key=value ...]"


def usage() -> str:
    lines = [
        ("pretrain", RECIPE, "train an encoder on unlabeled images"),
        ("submit", RECIPE, "the same as a job of a SLURM cluster, queued again until it is done"),
        *((name, words, text) for name, (words, text) in EVALUATIONS.items()),
        ("compare", "<run> <run> ...", "their results side by side, with the intervals of the differences"),
        ("data", RECIPE, "what images are like: sizes, broken ones, duplicates, mean, crops"),
        ("bench", RECIPE, "how fast this machine runs a recipe, and what to change first"),
        ("export", "run=... to=timm out=<folder>", "write it in a form that timm loads"),
    ]
    return (
        "sslvit <command> [words]\n\n"
        + "".join(f"  {name:<11}{words:<39}  {text}\n" for name, words, text in lines)
        + "\n`sslvit <command> --help` lists the keys of a command. On several GPUs: accelerate launch -m sslvit "
        "<command> ...\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, 2 for a mistake of the user's, which is one sentence and no traceback, or 75 for a run that was
    asked to stop and goes on when the same command is started again."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    command, words = words[0], words[1:]
    try:
        return _find(command)(words) or 0
    except UserError as error:
        print(f"sslvit {command}: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{stopped} Start the same command to go on (exit status {REQUEUE}).")
        return REQUEUE
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _find(command: str) -> Callable[[list[str]], int | None]:
    commands = {
        "pretrain": _pretrain,
        "submit": _submit,
        **{name: partial(_evaluate, name) for name in EVALUATIONS},
        "compare": _compare,
        "data": _data,
        "bench": _bench,
        "export": _export,
    }
    if command not in commands:
        near = difflib.get_close_matches(command, commands, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"there is no command {command}.{hint} Commands: {', '.join(commands)}.")
    return commands[command]


def _wants_help(words: list[str]) -> bool:
    return any(word in ("-h", "--help", "help") for word in words)


def _pretrain(words: list[str]) -> int | None:
    from . import config

    if _wants_help(words):
        method = next((word.split("=", 1)[1] for word in words if word.startswith("method=")), "mae")
        print("sslvit pretrain [recipe.yaml] [folder of images] [key=value ...]\n")
        presets = [word.split("=", 1)[1] for word in words if word.startswith(("preset=", "objective.preset="))]
        shown = f"method={method}" + "".join(f" preset={preset}" for preset in presets[-1:])
        print(f"Keys with their defaults for {shown}; a key may be given by its last name alone:\n")
        print(config.help_text(method, *presets[-1:]))
        return None
    from .distributed import say
    from .pretrain import pretrain, summary

    result = pretrain(config.load(words))
    if result.stopped:
        if int(os.environ.get("RANK", "0")) == 0:
            print(
                f"Stopped by {result.stopped} after step {result.steps}, which is saved in {result.run_dir}: start the "
                f"same command to go on (exit status {REQUEUE})."
            )
        return REQUEUE
    say(*summary(result))
    return None


def _submit(words: list[str]) -> None:
    from . import config, submit

    def assigned(word: str) -> str:
        return word.lstrip("-").partition("=")[0]

    if _wants_help(words):
        print("sslvit submit [recipe.yaml] [images] [key=value ...] [submit.key=value ...]\n")
        print(f"{submit.__doc__.strip()}\n\nThe words are those of sslvit pretrain, and these:\n")
        print("\n".join(help_lines(submit.Config(), "submit.")))
        return
    names = {item.name for item in fields(submit.Config)}
    own = [word for word in words if word.lstrip("-").startswith("submit.") or assigned(word) in names]
    settings = parse(submit.Config(), [word.lstrip("-").removeprefix("submit.") for word in own], "submit")
    print("\n".join(submit.submit(config.load([word for word in words if word not in own]), settings)))


def _evaluate(name: str, words: list[str]) -> None:
    module = import_module(f".evaluation.{name}", __package__)
    if _wants_help(words):
        print(f"sslvit {name} {EVALUATIONS[name][0]} [key=value ...]\n")
        print(f"{module.__doc__.strip()}\n\nKeys with their defaults; a key may be given by its last name alone:\n")
        print("\n".join(help_lines(module.Config())))
    else:
        module.run(parse(module.Config(), words, name))


def _compare(words: list[str]) -> None:
    from .evaluation import compare

    if _wants_help(words):
        print("sslvit compare <run> <run> ... [key=value ...]\n")
        print(f"{compare.__doc__.strip()}\n\n" + "\n".join(help_lines(compare.Config())))
        return
    own = [word for word in words if "=" in word and not os.path.lexists(word.removeprefix("untrained:"))]
    compare.compare([word for word in words if word not in own], parse(compare.Config(), own, "compare"))


def _bench(words: list[str]) -> None:
    from . import bench, config

    if _wants_help(words):
        print("sslvit bench [recipe.yaml] [folder of images] [key=value ...]\n")
        print(f"{bench.__doc__.strip()}\n\nThe words are those of sslvit pretrain, and two more:\n")
        print("\n".join(help_lines(bench.Config())))
        return
    own = [word for word in words if word.startswith(("seconds=", "report="))]
    run, settings = config.load([word for word in words if word not in own]), parse(bench.Config(), own, "bench")
    report = bench.bench(run, settings)
    if int(os.environ.get("RANK", "0")) == 0:
        print("\n".join(bench.lines(report, run)))
        if settings.report:
            bench.save(report, Path(settings.report))


def _data(words: list[str]) -> None:
    from . import config, picture, report

    if _wants_help(words):
        print("sslvit data <images> [recipe.yaml] [key=value ...]\n")
        print(f"{report.__doc__.strip()}\n\nThe words are those of sslvit pretrain, and three more:\n")
        print("\n".join(help_lines(report.Config())))
        return
    own = [word for word in words if word.startswith(("sample=", "picture=", "report="))]
    rest = [word for word in words if word not in own]
    run, settings = config.load(rest), parse(report.Config(), own, "data")
    found = report.examine(run, settings)
    print("\n".join(report.lines(found, run, rest)))
    if settings.picture:
        print()
        picture.draw(run, Path(settings.picture))
    if settings.report:
        report.save(found, Path(settings.report))


def _export(words: list[str]) -> None:
    from . import export

    if _wants_help(words):
        print("sslvit export run=... to=timm out=<folder>\n")
        print("\n".join(help_lines(export.Config())))
    else:
        export.run(parse(export.Config(), words, "export"))


if __name__ == "__main__":
    sys.exit(main())
