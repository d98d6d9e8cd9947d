"""Writes the TensorBoard runs of an evaluation anew from its results.json.

    python -m lit_modules.dashboard logs/digits/evaluation_0/results.json --theme dark

They go beside the file, in the place of those that are there.
"""

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentError, ArgumentParser

from lit_modules.command_line import UserError, user_errors_in_one_line
from lit_modules.dashboard import how_to_open, remove, write
from lit_modules.dashboard.style import THEMES
from lit_modules.evaluation_result import EvaluationResult


def main(arguments: list[str] | None = None) -> None:
    """Raises UserError: the file is none that evaluate.py wrote, or the folder cannot be written."""
    parser = ArgumentParser(
        prog="python -m lit_modules.dashboard", description=__doc__.partition("\n")[0], exit_on_error=False
    )
    parser.add_argument("results", type=Path, help="results.json, as evaluate.py writes it")
    parser.add_argument("--log-dir", type=Path, help="default: the folder of results.json")
    parser.add_argument("--theme", type=Literal["light", "dark"], default="light", help="of the figures")
    try:
        args = parser.parse_args(arguments)
        result = EvaluationResult.read_json(args.results)
        folder = args.log_dir or args.results.parent
        remove(folder)
        write(result, folder, THEMES[args.theme])
    except (ArgumentError, OSError, ValueError) as error:
        raise UserError(error) from error
    print(how_to_open(folder))


if __name__ == "__main__":
    with user_errors_in_one_line():
        main()
