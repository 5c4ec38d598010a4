"""The card beside saved weights: what it says of the network and of how it opens."""

from modhifi_cli.pages.card import card

RESULTS = {
    "verb": "prune", "model": "m", "weights": "m (sha256 0)", "achieved": {"params": 0.199, "model_params": 0.174, "flops": 0.2},
}  # fmt: skip


def made(by: str, why: str = "", **more) -> str:
    return card(RESULTS | more, opening={"by": by, "why": why}, exports=(), repeat="")


def test_shares_are_told_as_on_every_page():
    told = "Removed: 19.9 % of decoder parameters (17.4 % of the network), 20 % of FLOPs."
    assert told in made("transformers")
    assert "model_params" not in made("transformers")


def test_what_opens_a_folder_and_why_do_not_contradict_each_other():
    assert "trust_remote_code" not in made("transformers") and "opens it" not in made("transformers")
    own = made("transformers with trust_remote_code", "its layers differ in width")
    assert "trust_remote_code=True" in own and "It brings code of its own: its layers differ in width." in own
    ours = made("modhifi", "its heads lie apart")
    assert "load_model('FOLDER')" in ours and "Plain transformers does not open it: its heads lie apart." in ours


def test_a_run_without_shares_says_where_they_are():
    assert "Removed: as the edits say." in made("transformers", achieved={})
