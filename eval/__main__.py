"""`python -m eval <command>`: generate, score, speed, report, or all of it by sweep."""

import argparse
import importlib
import sys
from collections.abc import Sequence

# Imported when asked for: a machine that only generates needs none of the packages that plot or score.
COMMANDS = {
    "sweep": (
        "eval.sweep",
        "generate, score, speed and report: methods at ratios, and what they must beat",
    ),
    "generate": ("eval.generate.run", "the images of one setting"),
    "score": ("eval.metrics.score", "what a setting cost in quality"),
    "speed": ("eval.bench.pipeline", "how long a step takes, in turns with the unreduced pipeline"),
    "stacking": ("eval.bench.stacking", "whether tofu's gain and another speed-up's multiply"),
    "growth": (
        "eval.bench.growth",
        "how the cost of plans, merges and unmerges grows with the tokens",
    ),
    "flops": ("eval.bench.full_size", "FLOPs that full-size denoisers save, without their weights"),
    "padding": (
        "eval.bench.text_padding",
        "FLOPs of full-size denoisers that go into text padding",
    ),
    "study": ("eval.studies.study", "drift of many combinations, without pictures or times"),
    "tune": ("eval.tune", "the settings that drift least, found on a pipeline of yours"),
    "calibrate": ("eval.calibrate", "probes for importance source gradient"),
    "tables": ("eval.report.tables", "the documents' tables and plots, from committed rows"),
    "report": ("eval.report.page", "a page with plots, pictures and tables"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """A mistake in the arguments ends with exit code 2, and with what is on disk as it was."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    parsers = {name: commands.add_parser(name, help=text) for name, (_, text) in COMMANDS.items()}
    wanted = given[0] if given else None
    if wanted in COMMANDS:
        module = importlib.import_module(COMMANDS[wanted][0])
        command = parsers[wanted]
        command.description = module.__doc__
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(command)
    args = parser.parse_args(given)
    try:
        module.main(args)
    except (ImportError, OSError, ValueError) as error:
        # What `command.error` says, without pages of usage above it.
        command.exit(2, f"{command.prog}: error: {error}\n")
    except KeyboardInterrupt:
        command.exit(
            130,
            f"{command.prog}: stopped; what is written is kept, and generate, sweep and tune go on from it\n",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
