"""HTML pages from Jinja's templates."""

from pathlib import Path

import jinja2


def template(path: Path) -> jinja2.Template:
    """The template in a file. What it is given is text, never HTML, and a name that it is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(path.name)
