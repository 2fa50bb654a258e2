"""YAML as far as settings need it: names and values, lists and mappings of values. The rest of YAML is refused.

What is refused is what makes a small file large: anchors and aliases, names that are lists, endless numbers.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

MOST_EVENTS = 20_000  # names, values, and beginnings and ends of lists and mappings
DEEPEST = 50
LONGEST_NUMBER = 1000  # characters of what YAML would make a number, a date or bytes
TEXT = "tag:yaml.org,2002:str"


def plain_mapping(text: bytes) -> dict[str, Any]:
    """The names and values of a YAML document; an empty one has none.

    Raises:
        ValueError: it is not YAML, not a mapping, has a name twice, or what this file refuses.
    """
    import yaml

    try:
        _check_events(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return {}
        _check_nodes(root)
        return {str(name): value for name, value in yaml.safe_load(text).items()}
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"is not valid YAML: {' '.join(str(error).split())[:500]}") from None


def _check_events(text: bytes) -> None:
    """Refuse a document that would be composed for long: with aliases, or of very many parts."""
    import yaml

    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"has the alias *{event.anchor}: write its value instead")
        if count > MOST_EVENTS or depth > DEEPEST:
            raise ValueError("has too many values" if count > MOST_EVENTS else "is nested too deeply")


def _check_nodes(root: Any) -> None:
    """Refuse a document that is more than names and values, before its values are made."""
    from yaml import MappingNode, ScalarNode

    if root.id != MappingNode.id:
        raise ValueError("must hold 'name: value' lines")
    waiting = [root]
    while waiting:
        node = waiting.pop()
        where = f"in line {node.start_mark.line + 1}"
        if isinstance(node, MappingNode):
            if not all(isinstance(key, ScalarNode) for key, _ in node.value):
                raise ValueError(f"has a name {where} that is a list or a mapping")
            names = Counter(key.value.replace("-", "_") for key, _ in node.value)
            if twice := [name for name, count in names.items() if count > 1]:
                raise ValueError(f"sets {', '.join(sorted(twice)[:3])} twice")
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, ScalarNode):
            if node.tag != TEXT and len(node.value) > LONGEST_NUMBER:
                raise ValueError(f"has a number {where} that is too long")
        else:
            waiting += node.value
