"""The reference, made from the code: public names, the fields of dataclasses, and links from code to both.

`.. names:: MODULE` documents the names in its content, with a table of their first lines. A public name that no page
documents is a warning, and so an error of `make docs`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from public_names import public_objects, undocumented
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import stringify_signature
from sphinx.util.nodes import make_refnode
from sphinx.util.typing import ExtensionMetadata

logger = logging.getLogger(__name__)
PUBLIC = public_objects()
LONGEST_DEFAULT = 48


def first_line(text: str | None) -> str:
    """The first paragraph of a docstring as one line."""
    return " ".join(inspect.cleandoc(text or "").partition("\n\n")[0].split())


def doc_of_data(name: str, value: Any) -> str:
    """The docstring below a constant or an alias, from the module that defines it; empty if there is none."""
    for module in sorted(module for module in sys.modules if module.startswith("attnax.")):
        if vars(sys.modules[module]).get(name) is value:
            docs = ModuleAnalyzer.for_module(module).find_attr_docs()
            if ("", name) in docs:
                return "\n".join(docs["", name])
    return ""


def is_code(value: Any) -> bool:
    """Whether the value is a class or a function, which has a docstring of its own."""
    return inspect.isclass(value) or inspect.isroutine(value)


class Names(SphinxDirective):
    """Documents public names of a module, which are the lines of the content."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """A table of all names, then each name with its docstring."""
        module = self.arguments[0]
        names = [line.strip() for line in self.content if line.strip()]
        for name in names:
            if f"{module}.{name}" not in PUBLIC:
                raise self.error(f"{module}.{name} is no public name, or is documented under another module")
        lines = [".. list-table::", "   :class: names", "   :widths: auto", ""]
        for name in names:
            value = PUBLIC[f"{module}.{name}"]
            doc = value.__doc__ if is_code(value) else doc_of_data(name, value)
            if not first_line(doc):
                raise self.error(f"{module}.{name} has no docstring")
            lines += [f"   * - :py:obj:`~{module}.{name}`", f"     - {first_line(doc)}"]
        for name in names:
            lines += ["", *self.entry(module, name)]
        source = f"<names of {module}>"
        return self.parse_text_to_nodes(StringList(lines, source=source))

    def entry(self, module: str, name: str) -> Iterator[str]:
        """The directive of a name."""
        value = PUBLIC[f"{module}.{name}"]
        if inspect.isclass(value):
            yield f".. autoclass:: {module}.{name}"
            yield "   :members:"
            yield "   :special-members: __call__"
            if hasattr(value, "__members__"):
                yield "   :undoc-members:"
        elif inspect.isroutine(value):
            yield f".. autofunction:: {module}.{name}"
        else:
            shown = re.sub(
                r"\b(typing|jaxtyping|collections\.abc|jax|numpy|attnax(\.\w+)*)\.(?=[A-Z])", "", repr(value)
            )
            yield f".. py:data:: {module}.{name}"
            if len(shown) < 3 * LONGEST_DEFAULT and " object at " not in shown:
                yield f"   :value: {shown}"
            yield ""
            yield from (f"   {line}" for line in doc_of_data(name, value).splitlines())


def own_attributes(doc: str) -> dict[str, str]:
    """The entries of the section "Attributes" of a docstring."""
    section = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n)*)", inspect.cleandoc(doc) + "\n", re.MULTILINE)
    entries = re.findall(
        r"^    (\w+)(?: \([^)]*\))?: ((?:.*\n?)(?:^     +.*\n?|^\n)*)", section[1] if section else "", re.M
    )
    return {name: " ".join(text.split()) for name, text in entries}


def attributes(cls: type) -> dict[str, str]:
    """The text of each field, of the class and of those that it extends."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        found |= own_attributes(vars(each).get("__doc__") or "")
    return found


def shown_default(field: dataclasses.Field[Any]) -> str:
    """The default of a field as code, behind its type; ", required" for none."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return ", required"
    shown = f"{type(value).__name__}.{value.name}" if hasattr(type(value), "__members__") else repr(value)
    if len(shown) > LONGEST_DEFAULT or " at 0x" in shown:
        shown = f"{getattr(value, '__name__', None) or type(value).__name__ + '(...)'}"
    return f" = {shown}"


def table_of_fields(cls: type) -> list[str]:
    """A table of the fields of a dataclass: name, type and default, and the text of its docstring."""
    texts = attributes(cls)
    lines = [".. list-table::", "   :class: fields", "   :widths: auto", ""]
    for field in dataclasses.fields(cls):
        if field.name.startswith("_"):
            continue
        if field.name not in texts:
            logger.warning("the docstring of %s.%s lacks the field %s", cls.__module__, cls.__qualname__, field.name)
        kind = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
        lines += [f"   * - | **{field.name}**", f"       | ``{kind}{shown_default(field)}``"]
        lines += [f"     - {texts.get(field.name, '')}"]
    return lines


def keep_bars(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Absolute values, `|q - kv|`, which reStructuredText takes for substitutions."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = line.split("`")
            parts[::2] = [re.sub(r"\|(?=\S[^|]*\|)", r"\\|", part) for part in parts[::2]]
            lines[number] = "`".join(parts)


def show_fields(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Puts a table in the place of the section "Attributes" of a dataclass."""
    if what != "class" or not dataclasses.is_dataclass(obj) or "Attributes:" not in lines:
        return
    start = lines.index("Attributes:")
    end = start + 1
    while end < len(lines) and (not lines[end] or lines[end].startswith(" ")):
        end += 1
    lines[start:end] = [*table_of_fields(obj), ""]


def show_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    """The annotations as the source has them, such as `Float[Array, "B N T H"]`; none for a class of fields."""
    if signature is None:
        return None
    if what == "class":
        if dataclasses.is_dataclass(obj) and own_attributes(obj.__doc__ or ""):
            return "", None
        if not inspect.isfunction(obj.__init__) or getattr(obj, "_is_protocol", False):
            return "", None
        call, bound = inspect.signature(obj.__init__), True
    elif what in ("function", "method") and inspect.isroutine(obj):
        call = inspect.signature(obj)
        source = ModuleAnalyzer.for_module(obj.__module__)
        source.analyze()
        source.overloads.clear()  # they serve type checkers; the function itself has the names of all arguments
        bound = what == "method" and next(iter(call.parameters), "") in ("self", "cls")
    else:
        return None
    parameters = [each for each in call.parameters.values() if not (bound and each.name in ("self", "cls"))]
    call = call.replace(parameters=[_in_source(each) for each in parameters])
    shown = stringify_signature(call, show_return_annotation=False)
    back = call.return_annotation
    if what == "class" or back is inspect.Signature.empty:
        return shown, None
    return shown, back if isinstance(back, str) else inspect.formatannotation(back)


def _in_source(parameter: inspect.Parameter) -> inspect.Parameter:
    """The parameter, with a default that is no literal shown by its name."""
    value = parameter.default
    if value is not inspect.Parameter.empty and (inspect.isroutine(value) or inspect.isclass(value)):
        return parameter.replace(default=_Shown(value.__name__))
    return parameter


class _Shown:
    """A default of a signature, by the text that is shown."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def skip_member(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out the fields of named tuples, which the docstring of the class has."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def short_names() -> dict[str, list[str]]:
    """The full names behind each last part of a public name."""
    found: dict[str, list[str]] = {}
    for full in PUBLIC:
        found.setdefault(full.rpartition(".")[2], []).append(full)
    return found


SHORT = short_names()
CODE_NAME = re.compile(r"(?:attnax\.)?([A-Za-z_][\w.]*)(?:\(\))?")


def documented_name(text: str, objects: dict[str, Any]) -> str | None:
    """The documented name that code in a text means, or None.

    A word such as `first`, which may be a variable, is one only behind its module: `masks.first`.
    """
    match = CODE_NAME.fullmatch(text)
    if match is None:
        return None
    name = match[1]
    if f"attnax.{name}" in objects:
        return f"attnax.{name}" if "." in name or text.startswith("attnax.") or _says_itself(name) else None
    head, _, rest = name.partition(".")
    full = SHORT.get(head, [])
    if len(full) != 1 or not _says_itself(head):
        return None
    name = f"{full[0]}.{rest}" if rest else full[0]
    return name if name in objects else None


def _says_itself(name: str) -> bool:
    """Whether a name is unlike a variable: that of a class, or of several words."""
    return name[0].isupper() or "_" in name


class LinkCode(SphinxPostTransform):
    """Links code in a text that is a documented name to the reference."""

    default_priority = 5

    def run(self, **options: Any) -> None:
        """Wraps the literals of the page."""
        objects = self.env.domains.python_domain.objects
        for literal in list(self.document.findall(nodes.literal)):
            if any(isinstance(each, nodes.reference | nodes.title | addnodes.pending_xref) for each in _above(literal)):
                continue
            name = documented_name(literal.astext(), objects)
            if name is not None:
                entry = objects[name]
                link = make_refnode(
                    self.app.builder, self.env.docname, entry.docname, entry.node_id, literal.deepcopy()
                )
                literal.replace_self(link)


def _above(node: nodes.Node) -> Iterator[nodes.Node]:
    while node.parent is not None:
        node = node.parent
        yield node


def loosen_types(app: Sphinx, doctree: nodes.document) -> None:
    """Leaves the names of types to `resolve_type`, since two modules may have a name."""
    for node in doctree.findall(addnodes.pending_xref):
        if any(isinstance(each, addnodes.desc_signature | nodes.field) for each in _above(node)):
            for name in ("refspecific", "py:module", "py:class"):
                node.attributes.pop(name, None)


def resolve_type(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, text: nodes.TextElement
) -> nodes.Node | None:
    """A name in a signature: a link to a public name, plain text for another library's or a private one."""
    if node.get("refdomain") != "py":
        return None
    objects = env.domains.python_domain.objects
    name = node["reftarget"].rpartition(".")[2]
    full = [each for each in SHORT.get(name, []) if each in objects]
    full = [f"attnax.{name}"] if f"attnax.{name}" in full else full
    in_code = any(isinstance(each, addnodes.desc_signature | nodes.field) for each in _above(node))
    if in_code and len(full) == 1:
        entry = objects[full[0]]
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, text)
    return text if in_code else None


def check_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns about each public name that no page documents."""
    for name in undocumented(env.domains.python_domain.objects):
        logger.warning("no page of docs/reference documents the public name %s", name)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Adds the directive, the tables, the links and the check."""
    app.add_directive("names", Names)
    app.connect("autodoc-process-docstring", show_fields, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", keep_bars, priority=450)
    app.connect("autodoc-process-signature", show_signature)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("doctree-read", loosen_types)
    app.connect("missing-reference", resolve_type)
    app.connect("env-check-consistency", check_names)
    app.add_post_transform(LinkCode)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
