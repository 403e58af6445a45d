import pytest

from hiplora.errors import ConfigError
from hiplora.evaluation.naming import name_adapters


@pytest.fixture
def folders(tmp_path):
    for name in ("a/maths", "b/maths", "base", "x=y"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").write_text("{}")
    return tmp_path


def names(*given):
    return list(name_adapters(given))


def test_a_folder_is_called_by_its_name_until_that_is_taken(folders):
    assert names(folders / "a/maths", folders / "b/maths") == ["maths", "b/maths"]
    assert names(folders / "a/maths", folders / "a/maths", folders / "a/maths") == [
        "maths",
        "a/maths",
        "maths (2)",
    ]


def test_no_adapter_is_called_base(folders):
    (found,) = names(folders / "base")
    assert found == f"{folders.name}/base"
    with pytest.raises(ConfigError, match="'base' is taken"):
        names(f"base={folders / 'a/maths'}")


def test_names_can_be_given(folders):
    assert names(f"gsm8k={folders / 'a/maths'}") == ["gsm8k"]
    with pytest.raises(ConfigError, match="'one' is taken"):
        names(f"one={folders / 'a/maths'}", f"one={folders / 'b/maths'}")


def test_a_folder_with_an_equals_sign_is_a_folder(folders):
    assert names(str(folders / "x=y")) == ["x=y"]
