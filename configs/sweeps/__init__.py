"""Sweeps, one per module; launch/sweep.py describes their contents and runs them."""


def product(choices: dict[str, list]) -> list[dict]:
    """Every combination of one value for each key; the last key changes fastest."""
    runs = [{}]
    for key, values in choices.items():
        runs = [run | {key: value} for run in runs for value in values]
    return runs
