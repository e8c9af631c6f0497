"""A tokenizer class that the engine's transformers does not have: the model is served from a shadow of its directory,
links to every file and a tokenizer_config.json that names the general class instead, which reads any tokenizer.json.

Found out from the installed package's text: to import it takes seconds. Newer transformers fall back by themselves.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from vllmd.system.files import read_small

CONFIG = "tokenizer_config.json"
FALLBACK = "PreTrainedTokenizerFast"
FOLDER = "tokenizers"
LIMIT_BYTES = 64 << 20
_REFUSES = "does not exist or is not currently imported"
"""What a transformers says, and so has in its text, that ends a start where it does not know the class."""
_NAME = re.compile(r"\b[A-Z]\w*\b", re.ASCII)


def prepare(directory: Path, executable: str, cache: Path) -> tuple[Path, str]:
    """The directory to serve, and what was done about its tokenizer ('' for nothing, which is the rule). OSError."""
    config = _object(directory / CONFIG)
    name = config.get("tokenizer_class")
    if not isinstance(name, str) or not name or _brings_code(config) or _brings_code(_object(directory / "config.json")):
        return directory, ""
    if _is_known(name, _package(Path(executable))):
        return directory, ""
    said = f"{CONFIG} names the class {name[:100]!r}, which this engine's transformers does not have"
    if not (directory / "tokenizer.json").is_file():
        return directory, f"{said}; without a tokenizer.json nothing can stand in for it, so the engine may refuse the model"
    text = json.dumps({**config, "tokenizer_class": FALLBACK}, indent=1, ensure_ascii=False) + "\n"
    return _shadow(directory, text, cache / FOLDER), f"{said}; it is given {FALLBACK} instead"


def _object(path: Path) -> dict[str, Any]:
    """Empty where there is none, or none that can be understood: then the engine is left to say so."""
    try:
        value = json.loads(path.read_bytes() if path.stat().st_size <= LIMIT_BYTES and path.is_file() else b"{}")
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _brings_code(config: dict[str, Any]) -> bool:
    """Whether the class is the model's own."""
    own = config.get("auto_map")
    return isinstance(own, (list, str)) or (isinstance(own, dict) and "AutoTokenizer" in own)


def _package(executable: Path) -> Path | None:
    found = sorted((executable.parent.parent / "lib").glob("python3*/site-packages/transformers"))
    return found[0] if found else None


def _is_known(name: str, package: Path | None) -> bool:
    """Also where it cannot be told. `name` may stand for its Fast variant, but not the other way round."""
    auto = _text(package / "models/auto/tokenization_auto.py") if package else ""
    if package is None or _REFUSES not in auto:
        return True
    wanted = {name, f"{name}Fast"}
    if name == FALLBACK or wanted & set(_NAME.findall(auto)):
        return True
    places = [package / "__init__.py", *package.glob("tokenization_*.py"), *package.glob("models/*/tokenization*.py")]
    return any(wanted & set(_NAME.findall(_text(place))) for place in places)


def _text(path: Path) -> str:
    try:
        return read_small(path, LIMIT_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _shadow(directory: Path, text: str, folder: Path) -> Path:
    """FOLDER/<model>-<content>, made whole under another name first; older ones of the same directory are removed."""
    model = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    target = folder / f"{model}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    links = {entry.name: str(entry) for entry in directory.iterdir() if entry.name != CONFIG}
    if not _is_intact(target, links, text):
        folder.mkdir(mode=0o755, exist_ok=True, parents=True)
        import tempfile

        making = Path(tempfile.mkdtemp(prefix=f".{model}-", dir=folder))
        try:
            _fill(making, links, text)
            _discard(target)
            making.rename(target)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    for old in folder.glob(f"{model}-*"):
        if old != target:
            _discard(old)
    return target


def _fill(making: Path, links: dict[str, str], text: str) -> None:
    making.chmod(0o755)
    for name, file in links.items():
        (making / name).symlink_to(file)
    (making / CONFIG).write_text(text, encoding="utf-8")


def _is_intact(target: Path, links: dict[str, str], text: str) -> bool:
    try:
        if target.is_symlink() or {entry.name for entry in target.iterdir()} != {*links, CONFIG}:
            return False
        return read_small(target / CONFIG, LIMIT_BYTES) == text.encode() and all(os.readlink(target / name) == file for name, file in links.items())  # noqa: PTH115 - compared as texts
    except OSError:
        return False


def _discard(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
