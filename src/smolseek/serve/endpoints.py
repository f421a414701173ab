"""The page at /docs: the endpoints and the fields of their bodies, from the OpenAPI schema. It needs no other host."""

import base64
import hashlib
import html
from collections.abc import Iterator, Mapping
from typing import Any

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; font-size: 1.1rem; font-family: ui-monospace, monospace; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884; }
"""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'sha256-"
    f"{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
"""Headers of the page: nothing but this style may be used."""


def page(schema: Mapping[str, Any]) -> str:
    """Return the page for an OpenAPI schema."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>smolseek serve: endpoints</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><main>'
        "<h1>smolseek serve</h1><p>The endpoints of OpenAI's interface, for one model. "
        '<a href="/">The playground</a>. <a href="/openapi.json">The same for programs</a> (OpenAPI).</p>'
        f"{''.join(_sections(schema))}</main></body></html>"
    )


def _sections(schema: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield f"<h2>{method.upper()} {html.escape(path)}</h2><p>{html.escape(operation['description'])}</p>"
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            if reference := content.get("schema", {}).get("$ref"):
                fields = schema["components"]["schemas"][reference.rpartition("/")[2]]["properties"]
                yield "<table><tr><th>field</th><th>meaning</th></tr>"
                for name, field in fields.items():
                    meaning = html.escape(field.get("description", ""))
                    yield f"<tr><td><code>{html.escape(name)}</code></td><td>{meaning}</td></tr>"
                yield "</table>"
