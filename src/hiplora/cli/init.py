"""`hiplora init`: write a training recipe to edit."""

from pathlib import Path

import typer


def command(
    out: Path = typer.Option(Path("recipe.yaml"), "--out", help="Recipe to write; it must not exist yet."),
    model: str = typer.Option("smollm2-135m", "--model", help="Base model."),
    data: str = typer.Option("rows.jsonl", "--data", help="File with training rows."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the recipe if it exists."),
) -> None:
    """Write a training recipe with comments, to edit and to give to `hiplora train`.

    Example:
      hiplora init --model smollm2-135m --data rows.jsonl --out recipe.yaml
    """
    from hiplora.files import check_output_file, write_atomic
    from hiplora.training.reading import commented

    write_atomic(check_output_file(out, overwrite), commented(model, data))
    typer.echo(f"next: hiplora train {out} --dry-run   (shows what is learned), then with --out DIR")
