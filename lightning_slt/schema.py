"""A file or a mapping checked against a dataclass, and what is wrong with it in one line."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union, cast, get_args, get_origin, get_type_hints

import yaml  # OmegaConf's own parser
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

Source = Union[str, os.PathLike[str], Mapping[str, Any], DictConfig]
"""A YAML file, or what such a file holds."""


def checked(source: Source, overrides: Sequence[str], schema: type[Any]) -> Any:
    """An instance of ``schema`` with what the source says, and the overrides on top.

    Arguments and errors are those of :func:`~lightning_slt.config.load`.

    Example:
        >>> @dataclasses.dataclass
        ... class Size:
        ...     width: int = 1
        >>> checked({}, ["width=3"], Size).width
        3
        >>> checked({"widht": 3}, [], Size)
        Traceback (most recent call last):
        ValueError: widht=3: no such setting (did you mean width?). Size has width.
    """
    given = _read(source)
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not (equals and key.strip()):
            raise ValueError(f"override {item!r}: write it as key=value, such as num_chains=8.")
    try:
        given = cast(DictConfig, OmegaConf.merge(given, OmegaConf.from_dotlist(list(overrides))))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"overrides {list(overrides)}: {error}") from error
    _list_single_patterns(given, schema)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error, given, schema)) from error
    except TypeError as error:  # a list for a mapping, from OmegaConf 2.4 on
        if not _misfit(_plain(given), schema):
            raise
        raise ValueError(_explain(OmegaConfBaseException(str(error)), given, schema)) from error


def _read(source: Source) -> DictConfig:
    """The source as a config of its own, without a schema."""
    where = "the configuration"
    if isinstance(source, DictConfig):
        # resolved here: a node of a larger config may refer to its siblings
        raw: Any = OmegaConf.create(OmegaConf.to_container(source, resolve=True))
    elif isinstance(source, Mapping):
        raw = OmegaConf.create(dict(source))
    elif not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        raise TypeError(f"source={source!r}: expected settings, got {kind}. Give the path of a YAML file, or a dict.")
    elif not os.fspath(source) or os.path.isdir(source):
        raise ValueError(f"source={os.fspath(source)!r}: is no file. Give the path of a YAML file, or a dict.")
    else:
        where = str(Path(source))
        try:
            raw = OmegaConf.load(Path(source))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{where}: no such file. Give the path of a YAML file with settings.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{where}: not a YAML file: {error}") from error
    if not isinstance(raw, DictConfig):
        raise ValueError(f"{where}: expected settings as 'key: value', got a {type(raw).__name__}.")
    return raw


def _list_single_patterns(node: DictConfig, schema: type[Any]) -> None:
    """``restrict: fc.*`` as ``restrict: [fc.*]``, wherever the schema has it: the callback takes both."""
    if get_type_hints(schema).get("restrict") == Optional[list[str]] and isinstance(node.get("restrict"), str):
        node["restrict"] = [node["restrict"]]
    for name in map(str, node):
        inner = section(schema, name)
        if inner is None or OmegaConf.is_interpolation(node, name) or not isinstance(node[name], DictConfig):
            continue
        for part in node[name].values() if is_named(schema, name) else (node[name],):
            if isinstance(part, DictConfig):
                _list_single_patterns(part, inner)


def section(schema: type[Any], name: str) -> Optional[type[Any]]:
    """The dataclass that a field holds, an ``Optional`` or a dict of them by name taken off; None for plain fields."""
    hint = get_type_hints(schema).get(name)
    options = [t for t in (hint, *get_args(hint)) if dataclasses.is_dataclass(t)]
    return cast("type[Any]", options[0]) if options else None


def is_named(schema: type[Any], name: str) -> bool:
    """Whether a field holds any number of sections, each under a name of the user's."""
    return get_origin(get_type_hints(schema).get(name)) is dict


def is_list(schema: type[Any], name: str) -> bool:
    """Whether a field holds a list, or none."""
    hint = get_type_hints(schema).get(name)
    return list in (get_origin(kind) or kind for kind in (hint, *get_args(hint)))


def _plain(given: DictConfig) -> dict[Any, Any]:
    return cast("dict[Any, Any]", OmegaConf.to_container(given, resolve=False))


def _explain(error: OmegaConfBaseException, given: DictConfig, schema: type[Any]) -> str:
    """One line: which key, which value, what is wrong, and what there is."""
    what = str(error.msg or error).splitlines()[0].rstrip(".")
    plain = _plain(given)
    full_key = str(error.full_key or error.key or "") or _misfit(plain, schema)
    *sections, last = full_key.split("[")[0].split(".")
    owner: Optional[type[Any]] = schema
    value: Any = plain
    of_a_name: Optional[type[Any]] = None  # what stands under the names of a dict
    for key in sections:
        value = _item(value, key)
        if of_a_name is not None:
            owner, of_a_name = of_a_name, None
            continue
        inner = section(owner, key) if owner is not None else None
        owner, of_a_name = (None, inner) if owner is not None and is_named(owner, key) else (inner, None)
    value = _item(value, last)
    expected = of_a_name or (section(owner, last) if owner is not None else None)
    if expected is not None and not isinstance(value, Mapping):
        what = f"expected the settings of a {expected.__name__}"
    elif isinstance(error, InterpolationResolutionError):
        pass  # what is wrong with it is said, and no value is known
    elif owner is not None and is_list(owner, last) and not isinstance(value, (list, tuple)):
        what = "expected a list"
    elif isinstance(value, Mapping) and "." in str(value.get("class_path")):
        what = "expected a name, write it as {}:{}".format(*value["class_path"].rsplit(".", 1))
    if owner is None:
        return f"{full_key}={value!r}: {what}."
    if isinstance(error, MissingMandatoryValue):
        return f"{full_key}: is missing, and has no default. {owner.__name__} needs {_needed(owner)}."
    names = [f.name for f in dataclasses.fields(owner)]
    if last not in names:
        near = difflib.get_close_matches(last, names, n=1)
        what = "no such setting" + (f" (did you mean {near[0]}?)" if near else "")
    return f"{full_key}={value!r}: {what}. {owner.__name__} has {', '.join(names)}."


def _needed(schema: type[Any]) -> str:
    """The fields without a default."""
    return " and ".join(f.name for f in dataclasses.fields(schema) if f.default == MISSING)


def _item(value: Any, key: str) -> Any:
    """``value[key]``, None where there is none; a key that YAML read as a number is found too."""
    return next((v for k, v in value.items() if str(k) == key), None) if isinstance(value, Mapping) else None


def _misfit(plain: Mapping[Any, Any], schema: type[Any]) -> str:
    """The first key whose value is a list, a mapping or a plain value where it is to be another of them: OmegaConf does
    not name it; empty where there is none."""
    for name, value in ((str(name), value) for name, value in plain.items()):
        if value is None:
            continue
        inner = section(schema, name)
        if inner is None:
            if is_list(schema, name) and isinstance(value, Mapping):
                return name
            continue
        if not isinstance(value, Mapping):
            return name
        parts = {f"{name}.{key}": part for key, part in value.items()} if is_named(schema, name) else {name: value}
        for key, part in parts.items():
            if not isinstance(part, Mapping):
                return key
            if below := _misfit(part, inner):
                return f"{key}.{below}"
    return ""
