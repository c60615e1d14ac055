"""Conditional transport against plain loops in float64, and the training of its networks."""

import copy
from types import SimpleNamespace

import pytest
import torch
from test_key_query import LENGTHS, padded_features

from hf_dskd import DSKDConfig
from hf_dskd.losses.conditional_transport import TransportCritics, transport_cost
from hf_dskd.losses.key_query import Discriminator, generator_loss, mmd, moment_matching, row_noise
from hf_dskd.losses.matching import Features
from hf_dskd.losses.states import ResponseStates
from hf_dskd.methods import MATCHINGS
from hf_dskd.training.adversary import Adversary
from hf_dskd.training.published import published_matching_term, published_transport_loss


D, H = 7, 5  # width of features, of the networks' outputs


def make_critics(dropout=0.0, dtype=torch.float64):
    return TransportCritics(D, H, dropout, seed=3).to(dtype).train()


def plain_networks(critics, x):
    """Outputs [n, h] of critic 1, navigator 1, critic 2 and navigator 2 for one example's rows [n, d]; no dropout."""

    def head(network, y):
        y = y @ network.linear1.weight.T + network.linear1.bias
        y = torch.where(y > 0, y, 0.1 * y) @ network.linear2.weight.T + network.linear2.bias
        return torch.stack([row / (row.square().sum().sqrt() + 1e-6) for row in y])

    outputs = []
    for critic, navigator in ((critics.critic1, critics.navigator1), (critics.critic2, critics.navigator2)):
        gate = x @ critic.highway.weight.T + critic.highway.bias
        y = torch.sigmoid(gate) * gate.clamp_min(0) + (1 - torch.sigmoid(gate)) * x
        outputs += [head(critic, y), head(navigator, x)]
    return outputs


def plain_transport(x, y, x_plan, y_plan):
    """Points x [n, c] and y [m, c] with what the navigator says of them."""
    n, m = len(x), len(y)
    cost = [[(x[i] - y[j]).square().sum().sqrt() for j in range(m)] for i in range(n)]
    score = [[(x_plan[i] * y_plan[j]).sum() for j in range(m)] for i in range(n)]
    total = 0.0
    for j in range(m):
        z = sum(torch.exp(score[i][j]) for i in range(n))
        total = total + sum(cost[i][j] * torch.exp(score[i][j]) / z for i in range(n)) / m / 2
    for i in range(n):
        z = sum(torch.exp(score[i][j]) for j in range(m))
        total = total + sum(cost[i][j] * torch.exp(score[i][j]) / z for j in range(m)) / n / 2
    return total


def plain_cost(critics, queries, keys):
    """Of one example's queries [n, d] and keys [m, d]."""
    q1, q1_plan, q2, q2_plan = plain_networks(critics, queries)
    k1, k1_plan, k2, k2_plan = plain_networks(critics, keys)
    length = max(len(queries), len(keys))

    def features(rows):  # [n, h] -> [h, length], zeros after the response
        return torch.cat([rows, torch.zeros(length - len(rows), H, dtype=rows.dtype)]).T

    return plain_transport(q1, k1, q1_plan, k1_plan) + plain_transport(*map(features, (q2, k2, q2_plan, k2_plan)))


def test_matches_plain_loops_in_value_and_gradient():
    critics = make_critics()
    queries, keys, query_mask, key_mask = padded_features()
    queries.requires_grad_()
    actual = transport_cost(critics, queries, keys, query_mask, key_mask)
    expected = torch.stack(
        [plain_cost(critics, q[m], k[n]) for q, k, m, n in zip(queries, keys, query_mask, key_mask)]
    )
    assert (expected > 0.1).all()
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert not torch.autograd.grad(actual.sum(), queries, retain_graph=True)[0][~query_mask].any()
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)  # each example's gradient on its own
    inputs = [queries, *critics.parameters()]
    names = ["queries", *(name for name, _ in critics.named_parameters())]
    gradients = [torch.autograd.grad(values @ weights, inputs) for values in (actual, expected)]
    for name, gradient, plain in zip(names, *gradients):
        assert plain[~plain.isnan()].abs().max() > 0, name
        torch.testing.assert_close(gradient, plain, rtol=1e-6, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def test_noise_belongs_to_the_row():
    critics = make_critics(dropout=0.4)
    queries, keys, query_mask, key_mask = padded_features()
    noise = [
        row_noise(torch.arange(int(mask.sum())) + start, 2 * D, 5) for mask, start in ((query_mask, 0), (key_mask, 99))
    ]
    whole = transport_cost(critics, queries, keys, query_mask, key_mask, tuple(noise))
    assert not torch.allclose(whole, transport_cost(critics, queries, keys, query_mask, key_mask))
    n, m = LENGTHS[0]
    last = [rows[count:] for rows, count in zip(noise, (n, m))]
    rest = transport_cost(critics, queries[1:], keys[1:], query_mask[1:], key_mask[1:], tuple(last))
    torch.testing.assert_close(rest, whole[1:])
    # Half of the noise is for each critic.
    for half in (slice(0, D), slice(D, 2 * D)):
        changed = [rows.clone() for rows in noise]
        changed[0][:, half] = 1 - changed[0][:, half]
        assert not torch.allclose(transport_cost(critics, queries, keys, query_mask, key_mask, tuple(changed)), whole)
    critics.eval()
    torch.testing.assert_close(
        transport_cost(critics, queries, keys, query_mask, key_mask, tuple(noise)),
        transport_cost(critics, queries, keys, query_mask, key_mask),
    )


@pytest.mark.parametrize("count", [1, 4])
def test_gradient_is_finite_where_queries_are_keys(count):
    critics = make_critics(dtype=torch.float32)
    rows = torch.randn(2, count, D)
    queries, mask = rows.clone().requires_grad_(), torch.ones(2, count, dtype=torch.bool)
    values = transport_cost(critics, queries, rows, mask, mask)
    for gradient in torch.autograd.grad(values.sum(), [queries, *critics.parameters()]):
        assert torch.isfinite(gradient).all() and gradient.abs().max() < 100


def test_published_loss_pushes_queries_as_ours_does_and_networks_the_other_way():
    critics = make_critics()
    g = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 4, D, generator=g, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 4, D, generator=g, dtype=torch.float64)
    loss = published_transport_loss(critics, queries, keys)
    cost = sum(plain_cost(critics, q, k) for q, k in zip(queries, keys)) / 2
    torch.testing.assert_close(loss, -cost)
    inputs = [queries, *critics.parameters()]
    published, plain = torch.autograd.grad(loss, inputs), torch.autograd.grad(cost, inputs)
    torch.testing.assert_close(published[0], plain[0])
    for actual, expected in zip(published[1:], plain[1:]):
        torch.testing.assert_close(actual, -expected)


# ---- Training the networks


ONE_PROCESS = SimpleNamespace(num_processes=1)


def make_matching(tmp_path, matching="ct", critic=None, **settings):
    """A matching of small networks, or one that has `critic`."""
    small = {"discriminator_hidden_size": H, "use_cpu": True, "bf16": False, "report_to": "none"}
    config = DSKDConfig(str(tmp_path), **{**small, **settings})
    found = MATCHINGS[matching].load()(config, D, 3, torch.device("cpu"))
    if critic is not None:
        found.critic = critic
    return found


def make_adversary(tmp_path, critics=None, matching="ct", **settings):
    settings = {"discriminator_learning_rate": 3e-3, "max_grad_norm": 0.0, **settings}
    critics = make_critics(dtype=torch.float32) if critics is None else critics
    found = make_matching(tmp_path, matching, critics, **settings)
    adversary = Adversary(found, found.config)
    adversary.create_optimizer(10)
    return adversary


def make_features(lengths=LENGTHS, seed=0):
    queries, keys, query_mask, key_mask = padded_features(lengths, D, torch.float32, seed)
    names = [mask.nonzero()[:, 0] * 2**20 + mask.nonzero()[:, 1] for mask in (query_mask, key_mask)]
    return Features(queries, keys, query_mask, key_mask, *names)


def total_cost(critics, f):
    cost = transport_cost(critics.eval(), f.queries, f.keys, f.query_mask, f.key_mask)
    return (cost * f.query_mask.sum(1)).sum().item()


def test_critics_raise_the_cost_and_navigators_lower_it(tmp_path):
    adversary = make_adversary(tmp_path, discriminator_steps=5)
    before = copy.deepcopy(adversary.critic)
    features = make_features()
    adversary.keep(features)
    counts = features.query_mask.sum(), features.key_mask.sum()
    report = adversary.update(*counts, ONE_PROCESS)
    first = total_cost(before, features)
    assert set(report) == {"transport_cost", "grad_norm"} and report["grad_norm"] > 0
    assert report["transport_cost"].item() == pytest.approx(first, rel=1e-5)
    for names, sign in ((("critic1", "critic2"), 1), (("navigator1", "navigator2"), -1)):
        for name in names:
            moved = copy.deepcopy(before)
            getattr(moved, name).load_state_dict(getattr(adversary.critic, name).state_dict())
            assert sign * (total_cost(moved, features) - first) > 1e-4, name
    assert not any(parameter.requires_grad for parameter in adversary.critic.parameters())
    assert all(parameter.grad is None for parameter in adversary.critic.parameters())


@pytest.mark.parametrize("matching", ["ct", "gan"])
def test_how_the_batch_is_cut_up_changes_nothing(matching, tmp_path):
    whole = make_features()

    def part(start, stop):
        """The same examples, padded to their own longest."""
        rows, keys = (max(pair[side] for pair in LENGTHS[start:stop]) for side in (0, 1))
        return Features(
            whole.queries[start:stop, :rows],
            whole.keys[start:stop, :keys],
            whole.query_mask[start:stop, :rows],
            whole.key_mask[start:stop, :keys],
            whole.query_names[whole.query_names // 2**20 >= start][: sum(n for n, _ in LENGTHS[start:stop])],
            whole.key_names[whole.key_names // 2**20 >= start][: sum(m for _, m in LENGTHS[start:stop])],
        )

    results = []
    for cuts in ([(0, 4)], [(0, 2), (2, 4)], [(2, 4), (1, 2), (0, 1)]):
        critic = (TransportCritics if matching == "ct" else Discriminator)(D, H, 0.3, seed=3)
        adversary = make_adversary(tmp_path, critic, matching, discriminator_steps=3, max_grad_norm=0.1)
        for cut in cuts:
            adversary.keep(part(*cut))
        report = adversary.update(whole.query_mask.sum(), whole.key_mask.sum(), ONE_PROCESS, seed=7)
        results.append((report, adversary.critic.state_dict()))
    for report, weights in results[1:]:
        for actual, expected in ((report, results[0][0]), (weights, results[0][1])):
            assert actual.keys() == expected.keys()
            for name in expected:
                torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6)


# ---- The student's side


def states(mask):
    """A view that holds nothing but which rows are real, and of which examples."""
    nothing = torch.zeros(*mask.shape, 1)
    targets = torch.zeros_like(mask, dtype=torch.long)
    return ResponseStates(nothing, nothing, nothing, targets, mask, mask, example_ids=IDS)


IDS = torch.tensor([70, 11, 5, 42])


@pytest.mark.parametrize("matching", ["gan", "ct", "moments", "mmd"])
def test_matching_term(matching, tmp_path):
    queries, keys, query_mask, key_mask = padded_features(dtype=torch.float32)
    queries.requires_grad_()
    found = make_matching(tmp_path, matching, discriminator_dropout=0.3)
    critic = found.critic
    if critic is not None:
        critic.train().requires_grad_(False)
    term, features = found(states(query_mask), states(key_mask), queries, keys, 9)
    query_names = IDS.repeat_interleave(query_mask.sum(1)) * 2**20 + torch.cat([torch.arange(n) for n, _ in LENGTHS])
    key_names = IDS.repeat_interleave(key_mask.sum(1)) * 2**20 + torch.cat([torch.arange(m) for _, m in LENGTHS])
    if matching == "gan":
        logits = critic(queries[query_mask], row_noise(query_names, D, 9))
        expected = torch.stack([part.sum() for part in generator_loss(logits).split([n for n, _ in LENGTHS])])
    elif matching == "ct":
        noise = row_noise(query_names, 2 * D, 9), row_noise(-1 - key_names, 2 * D, 9)
        expected = transport_cost(critic, queries, keys, query_mask, key_mask, noise) * query_mask.sum(1)
    else:
        expected = {"moments": moment_matching, "mmd": mmd}[matching](queries, keys, query_mask, key_mask)
    torch.testing.assert_close(term, expected)
    (gradient,) = torch.autograd.grad(term.sum(), queries)
    assert torch.isfinite(gradient).all() and gradient[query_mask].abs().max() > 0
    if critic is None:
        assert features is None
        return
    assert not features.queries.requires_grad and features.queries.dtype == torch.float32
    assert torch.equal(features.query_names, query_names) and torch.equal(features.key_names, key_names)
    assert torch.equal(features.queries[features.query_mask], queries[query_mask])
    assert torch.equal(features.keys[features.key_mask], keys[key_mask])


@pytest.mark.parametrize("matching", ["gan", "ct"])
def test_published_matching_term_takes_every_position(matching):
    critic = {"gan": Discriminator, "ct": TransportCritics}[matching](D, H, 0.3).train()
    g = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 5, D, generator=g, requires_grad=True), torch.randn(2, 5, D, generator=g)
    loss = published_matching_term(critic, queries, keys, 4)
    assert loss.shape == ()
    torch.testing.assert_close(published_matching_term(critic, queries, keys, 4), loss, rtol=0, atol=0)
    assert published_matching_term(critic, queries, keys, 5) != loss
    (gradient,) = torch.autograd.grad(loss, queries)
    assert (gradient.abs().sum(-1) > 0).all()
