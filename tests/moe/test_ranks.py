"""Several ranks and several passes a step know what one process and one pass know."""

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from emoe_med.moe import EigenOptions, EigenRouter, LinearOptions, LinearRouter, MLPExperts, MLPOptions, MoELayer

WIDTH, EXPERTS, RANKS, PASSES = 8, 6, 2, 2


def layer(kind):
    torch.manual_seed(3)
    if kind == "eigen":
        router = EigenRouter(WIDTH, EXPERTS, 1, EigenOptions(rank=4))
        router.mix_logits.data = 5 * torch.eye(4, EXPERTS)  # each direction has an expert of its own
    else:
        router = LinearRouter(WIDTH, EXPERTS, 1, LinearOptions(noise=0.0, balance="switch"))
    return MoELayer(router, MLPExperts(WIDTH, EXPERTS, MLPOptions(hidden=4, zero_init=False)))


def tokens():
    """[ranks, passes, 1, T, D]: each part lies in a corner of its own, so that loads differ from part to part."""
    generator = torch.Generator().manual_seed(5)
    corners = 2 * torch.randn(RANKS, PASSES, 1, 1, WIDTH, generator=generator)
    return corners + 0.3 * torch.randn(RANKS, PASSES, 1, 9, WIDTH, generator=generator)


def state_after(made, loss):
    idle = made.take_idle()
    gradient = [parameter.grad for parameter in made.parameters()]
    made.after_step()
    state = {name: value for name, value in made.state_dict().items()}
    return {"idle": idle, "loss": loss.detach(), "gradient": gradient, "state": state}


def _rank(rank, folder, kind):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    made = layer(kind)
    ranked = DistributedDataParallel(made)
    for x in tokens()[rank]:  # every pass joins the ranks, as in a loop that knows nothing of no_sync
        y, routing = ranked(x)
        (y.square().mean() / PASSES + routing.aux_loss).backward()
    torch.save(state_after(made, routing.aux_loss), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["eigen", "linear"])
def test_ranks_and_passes_add_up_to_one_batch(tmp_path, kind):
    torch.multiprocessing.spawn(_rank, (tmp_path, kind), nprocs=RANKS)
    alone = layer(kind)
    y, routing = alone(tokens().flatten(0, 2).unsqueeze(0).flatten(1, 2))
    y.square().mean().backward()
    assert len(routing.load().nonzero()) > 1
    want = state_after(alone, routing.aux_loss)
    for rank in range(RANKS):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(got["idle"], want["idle"])
        assert got["idle"].any(), "an expert should be idle, or the test is too easy"
        for name, value in want["state"].items():
            torch.testing.assert_close(got["state"][name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_the_switch_loss_balances_the_step_and_not_its_parts():
    made = layer("linear").train()
    made.router.weight.data = torch.eye(WIDTH)[:, :EXPERTS]
    x = 3 * torch.eye(WIDTH)[:EXPERTS].unsqueeze(0)  # one token to each expert
    losses = [made(part)[1].aux_loss.item() for part in (x[:, :3], x[:, 3:])]
    made.after_step()
    whole = made(x)[1].aux_loss.item()
    assert whole == pytest.approx(made.router.balance.strength, rel=1e-5)
    assert losses[1] == pytest.approx(whole, rel=1e-5)  # by the last part the step is even
    made.after_step()
    assert made(x[:, :3])[1].aux_loss.item() == pytest.approx(losses[0])  # nothing is left of the last step
