"""A user without a home folder, as containers have them."""

import pwd

import pytest


def leave_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away every variable that says where home is, and the user's line in the list of users."""

    def nobody(number: int) -> pwd.struct_passwd:
        raise KeyError(number)

    for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
