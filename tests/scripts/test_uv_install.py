"""uv installs only with the same settings as pip; otherwise it does not install."""

import pytest
import uv_install


def test_settings_that_say_where_packages_come_from_are_given_on() -> None:
    listed = "\n".join(
        [
            ":env:.cert='/etc/ca.crt'",
            ":env:.find-links='/wheels'",
            ":env:.no-cache-dir='1'",
            "global.extra-index-url='\\nhttps://one/simple\\nhttps://two/simple'",
            "global.find-links='/other /more'",
            "global.index-url='https://mirror/simple'",
            "global.timeout='60'",
            "install.timeout='90'",
        ]
    )
    assert uv_install.environment_of_uv(listed) == {
        "UV_DEFAULT_INDEX": "https://mirror/simple",
        "UV_INDEX": "https://one/simple https://two/simple",
        "UV_FIND_LINKS": "/wheels",  # the environment replaces what files say
        "UV_HTTP_TIMEOUT": "90",
        "SSL_CERT_FILE": "/etc/ca.crt",
    }
    assert uv_install.environment_of_uv("") == {}


def test_settings_of_other_commands_are_of_no_matter() -> None:
    assert uv_install.environment_of_uv("download.platform='any'\nfreeze.timeout='10'") == {}


@pytest.mark.parametrize(
    "line", ["global.no-index='true'", "install.no-binary=':all:'", ":env:.client-cert='/key'"]
)
def test_a_setting_that_uv_has_no_name_for_leaves_it_to_pip(line: str) -> None:
    # Bug caught: a machine that may only install from its own folders gets packages from elsewhere.
    assert uv_install.environment_of_uv(f"global.timeout='60'\n{line}") is None
