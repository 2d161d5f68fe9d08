from pathlib import Path

from sonosco_mlflow.data.walking import files_below


def test_files_of_linked_folders_are_there_too(tmp_path: Path) -> None:
    for name in ("tree/b/2.wav", "tree/b/1.wav", "tree/a.wav", "disk/3.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    tree = tmp_path / "tree"
    (tree / "c").symlink_to(tmp_path / "disk")
    (tree / "d").symlink_to(tmp_path / "disk")
    (tree / "linked.wav").symlink_to(tmp_path / "disk" / "3.wav")
    (tree / "gone.wav").symlink_to(tmp_path / "nowhere")
    found = [str(path.relative_to(tree)) for path in files_below(tree)]
    assert found == ["a.wav", "b/1.wav", "b/2.wav", "c/3.wav", "d/3.wav", "linked.wav"]


def test_links_in_a_circle_come_to_an_end(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.wav").touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "here").symlink_to(tmp_path / "a")
    assert files_below(tmp_path) == [tmp_path / "a" / "1.wav"]
