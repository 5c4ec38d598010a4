"""Labels that do not belong to the network are refused before the work, not after it."""

import numpy as np

from modhifi_cli.cli import main


def test_labels_out_of_range_are_refused_before_the_prune(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(12))
    words = ["data=digits", "data.num_samples=20", "evaluation_data=arrays", "evaluation_data.path=test.npz"]
    assert main(["prune", *words, "evaluation=[top1]", "console=plain"]) == 2
    said = capsys.readouterr()
    assert "evaluation_data: expected labels 0 to 9 for the 10 logits of 'embedded', got 11" in said.err
    assert not list(tmp_path.glob("outputs/*")), "the run had begun"
