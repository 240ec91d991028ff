"""Who may use the server: names with hashed passwords in a file, and keys of the API in another one."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

COST, BLOCK, PARALLEL = 1 << 15, 8, 1  # of scrypt: 32 MiB, about 0.1 s
COSTS = [1 << n for n in range(10, 17)]  # that are taken from a file
MEMORY = 1 << 27  # bytes that a hash may take
SALT_BYTES, HASH_BYTES = 16, 32
LEAST_PASSWORD = 8  # letters
NAME = re.compile(r"[\w.@-]{1,64}")
REMEMBERED = 256  # right passwords that are not hashed again


@dataclass(frozen=True)
class Hashed:
    """A password's scrypt hash, with what it was made with."""

    cost: int
    salt: bytes
    value: bytes

    @classmethod
    def of(cls, password: str) -> Hashed:
        """The hash of a password, with a new salt."""
        salt = secrets.token_bytes(SALT_BYTES)
        return cls(COST, salt, _scrypt(password, COST, salt))

    @classmethod
    def read(cls, text: str) -> Hashed:
        """From what `str` gives; ValueError for other texts."""
        kind, cost, salt, value = text.split("$")
        read = cls(int(cost), base64.b64decode(salt, validate=True), base64.b64decode(value, validate=True))
        usable = read.cost in COSTS and read.salt and len(read.value) == HASH_BYTES
        if kind != "scrypt" or not usable:
            raise ValueError(text)
        return read

    def __str__(self) -> str:
        return "$".join(["scrypt", str(self.cost), *(_text(part) for part in (self.salt, self.value))])

    def fits(self, password: str) -> bool:
        """Whether it is the password's."""
        return hmac.compare_digest(_scrypt(password, self.cost, self.salt), self.value)


def _scrypt(password: str, cost: int, salt: bytes) -> bytes:
    return hashlib.scrypt(
        password.encode(), salt=salt, n=cost, r=BLOCK, p=PARALLEL, maxmem=MEMORY, dklen=HASH_BYTES
    )


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


class Accounts:
    """Names and passwords of a file, one NAME:HASH a line."""

    def __init__(self, users: Mapping[str, Hashed]) -> None:
        self._users = dict(users)
        self._nobody = Hashed.of(secrets.token_hex())  # an unknown name takes as long as a known one
        self._secret, self._right = secrets.token_bytes(), dict[bytes, None]()
        self._turn = threading.Lock()  # one hash at a time: each takes memory

    @classmethod
    def read(cls, file: str | Path) -> Accounts:
        """The accounts of a file; ValueError where it cannot be read, is no such file, or has none."""
        users = _read_users(file)
        if not users:
            raise ValueError(f"{file} holds no user: add one with --add_user NAME {file}")
        return cls(users)

    def knows(self, name: str, password: str) -> bool:
        """Whether there is such a user with this password; it takes a tenth of a second the first time."""
        seen = hmac.digest(self._secret, f"{name}:{password}".encode(), "sha256")
        if seen in self._right:
            return True
        with self._turn:
            right = self._users.get(name, self._nobody).fits(password) and name in self._users
        if right:
            if len(self._right) >= REMEMBERED:
                self._right.clear()
            self._right[seen] = None
        return right


def _read_users(file: str | Path) -> dict[str, Hashed]:
    users = {}
    for number, line in enumerate(_lines(file), 1):
        name, _, stored = line.partition(":")
        try:
            users[name] = Hashed.read(stored)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{file}, line {number}: this is no user with a hashed password; write the file with "
                "--add_user NAME FILE"
            ) from None
    return users


def _lines(file: str | Path) -> list[str]:
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def add_user(name: str, password: str, file: str | Path) -> None:
    """Write a user into a file, which only its owner can read; one of the same name is replaced.

    ValueError for a name with other characters than letters, digits and ._@-, and a short password.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"the name {name!r} has more than letters, digits and the characters . _ @ -")
    if len(password) < LEAST_PASSWORD:
        raise ValueError(f"the password is too short: use at least {LEAST_PASSWORD} letters")
    path = Path(file)
    users = {**(_read_users(path) if path.exists() else {}), name: Hashed.of(password)}
    try:
        with NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as written:
            written.writelines(f"{each}:{hashed}\n" for each, hashed in users.items())
        os.replace(written.name, path)  # made for its owner alone
    except OSError as error:
        raise ValueError(f"{file} cannot be written ({error.strerror})") from None


class Keys:
    """Keys of the API, one a line of a file."""

    def __init__(self, file: str | Path) -> None:
        """ValueError where the file cannot be read or holds none."""
        self._hashes = [_digest(line) for line in _lines(file)]
        if not self._hashes:
            raise ValueError(f"{file} holds no key: write one a line")

    def has(self, key: str) -> bool:
        """Whether it is one of them."""
        found = [hmac.compare_digest(_digest(key), each) for each in self._hashes]
        return any(found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
