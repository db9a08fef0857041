"""The use cases, without Typer, Rich or print: the only place where `icmlora` and `registry` meet."""
