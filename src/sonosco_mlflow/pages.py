"""Pages of HTML that need nothing else: no network, no other file."""

import base64

from jinja2 import Environment, PackageLoader, StrictUndefined


def page(template: str, **content: object) -> str:
    """Return a page by the name of its template in ``templates/``."""
    environment = Environment(
        loader=PackageLoader("sonosco_mlflow"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(**content)


def data_address(content: bytes, kind: str) -> str:
    """Return the address by which a page holds ``content`` itself.

    >>> data_address(b"hello", "text/plain")
    'data:text/plain;base64,aGVsbG8='
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
