"""`python -m kit.answers.metrics submission.csv solution.csv` scores any submission."""

import sys
from collections.abc import Sequence
from pathlib import Path

from kit.answers.metrics.mean_ap import evaluate_file


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    if len(given) != 2:
        sys.exit("usage: python -m kit.answers.metrics submission.csv solution.csv")
    try:
        print(evaluate_file(Path(given[0]), Path(given[1])))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"metrics: {error}")


if __name__ == "__main__":
    main()
