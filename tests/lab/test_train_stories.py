"""The training script: interrupted or not it gives the same model, which is the one served."""

import sys
from pathlib import Path

import pytest
import torch

from boe_vllm.models.build import load_model
from boe_vllm.models.rows import SequenceRows, pack

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import train_stories as script  # noqa: E402

SMALL = "--batch 4 --hidden-dim 16 --blocks 2 --heads 2 --cond-dim 4 --threads 2".split()


def train(folder, monkeypatch, *arguments):
    command = [*SMALL, "--out", str(folder / "model"), "--checkpoint", str(folder / "training.pt")]
    figures = {"bound": 1.0, "valid": 0.5, "entropy": 0.8}
    monkeypatch.setattr(script, "evaluate", lambda model, n: figures)  # takes a minute
    monkeypatch.setattr(sys, "argv", ["train_stories.py", *command, *arguments])
    script.main()
    return script.load_file(folder / "model" / "model.safetensors")


def test_an_interrupted_run_goes_on_to_the_same_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "whole").mkdir()
    whole = train(tmp_path / "whole", monkeypatch, "--steps", "4")

    class Interrupted(script.Training):
        def one_step(self, pool):
            if self.step == 2 and not self.args.resume:
                self.save()
                raise KeyboardInterrupt
            return super().one_step(pool)

    (tmp_path / "parts").mkdir()
    monkeypatch.setattr(script, "Training", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", monkeypatch, "--steps", "4")
    parts = train(tmp_path / "parts", monkeypatch, "--steps", "4", "--resume")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    card = (tmp_path / "parts" / "model" / "README.md").read_text()
    assert "--steps 4 --batch 4" in card and "--resume  # from step 2" in card


def test_the_trained_network_is_the_one_that_is_served(tmp_path, monkeypatch, capsys):
    weights = train(tmp_path, monkeypatch, "--steps", "2", "--lr", "0.05")
    served = load_model(tmp_path / "model")
    own = script.TinyMDLM(**served.config.to_dict())
    own.load_state_dict({k.removeprefix("backbone."): v for k, v in weights.items()})
    assert own.blocks[0].adaLN_modulation.bias.abs().max() > 1e-4
    tokens, hidden_BL = script.batch_of(0, 0, 1)
    state = tokens.masked_fill(hidden_BL, script.VOCAB[script.MASK])[0]
    masked = hidden_BL[0].nonzero()[:, 0].numpy()
    layout = pack([SequenceRows(tokens=state.numpy(), logit_positions=masked)], torch.device("cpu"))
    logits = served.logits(served.run(served.embed(layout.tokens), layout)[0])
    with torch.no_grad():
        want = own(state[None])[0][masked]
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=0)


def test_a_loss_is_a_bound_that_starts_at_the_size_of_the_vocabulary():
    """A network that knows nothing has ln of the number of words that it may write."""
    model = script.TinyMDLM(
        vocab_size=len(script.VOCAB), hidden_dim=16, n_blocks=1, n_heads=2, cond_dim=4
    )
    tokens, hidden_BL = script.batch_of(0, 0, 8)
    counts = hidden_BL.sum(1)
    assert not hidden_BL[:, 0].any() and counts.min() >= 1 and counts.max() <= 127
    assert len(set(counts.tolist())) == 8
    loss = script.bound(model, tokens, hidden_BL).item()
    assert loss == pytest.approx(torch.tensor(len(script.VOCAB) - 1.0).log().item(), abs=1e-4)
