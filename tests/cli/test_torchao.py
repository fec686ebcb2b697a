"""lowp torchao: one sentence for each action, and a wrong one names the right ones."""

from lowp.torchao import hook


def test_each_action_says_what_it_did(lowp, tmp_path, monkeypatch):
    monkeypatch.setattr(hook, "site_packages", lambda: tmp_path)
    assert lowp("torchao", "status").out.startswith("off")
    assert "wrote" in lowp("torchao", "enable").out
    assert lowp("torchao", "status", "--json").json()["said"].startswith("on")
    assert "removed" in lowp("torchao", "disable").out
    assert not list(tmp_path.iterdir())


def test_a_wrong_action_names_the_right_ones(lowp):
    answer = lowp("torchao", "enabel")
    assert answer.is_one_sentence() and "did you mean 'enable'" in answer.err
