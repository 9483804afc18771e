"""Label errors: swapped labels come first, suspects mostly are wrong, and a model that knows too little has none."""

import pytest
import torch
from benchmark import swapped
from cleanlab.rank import get_label_quality_scores
from conftest import growth
from sklearn.metrics import average_precision_score

from transfer.audit import label_errors
from transfer.audit.label_errors import fit_noise_rate, score_labels, score_labels_out_of_fold
from transfer.crossval import FoldHeads, assign_folds, train_fold_heads

RECIPE = {"num_classes": 20, "lrs": [0.005] * 20, "batch_size": 64}


def quality_of(table, labels, noise=0.0):
    table = table + noise * torch.randn(table.shape, generator=torch.Generator().manual_seed(0)) if noise else table
    return score_labels_out_of_fold(table, labels, torch.arange(len(labels)), **RECIPE)


@pytest.fixture(scope="module")
def table(sample):
    return sample["train"].features.gather(sample["train"].features.rows, slice(2))


@pytest.fixture(scope="module")
def by_share(sample, table):
    """By share of swapped labels, of one to eight draws: which are swapped, and the quality that was found, each.

    Over 3 s: 21 cross-validations, since a single draw's precision varies by 0.05.
    """
    found, labels = {}, sample["train"].features.labels
    for share in (0, 0.02, 0.05, 0.1, 0.2):
        draws = {0: 1, 0.05: 8, 0.1: 8}.get(share, 2)
        changed = [swapped(labels, share, seed) for seed in range(draws)]
        found[share] = [(each != labels, quality_of(table, each)) for each in changed]
    return found


@pytest.mark.parametrize(("share", "least"), [(0.05, 0.8), (0.1, 0.88)])
def test_swapped_labels_have_the_lowest_confidence(by_share, share, least):
    precisions = [average_precision_score(wrong, -found.confidence) for wrong, found in by_share[share]]
    assert sum(precisions) / len(precisions) >= least, precisions


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.2])
def test_most_suspects_are_wrong_and_most_of_what_is_wrong_is_suspect(by_share, share):
    right = sum(int(wrong[found.suspects].sum()) for wrong, found in by_share[share])
    suspects = sum(len(found.suspects) for _, found in by_share[share])
    assert right / suspects >= 0.6  # at least half is promised
    assert right / sum(int(wrong.sum()) for wrong, _ in by_share[share]) >= 0.55
    for _, found in by_share[share]:
        assert found.noise_rate == pytest.approx(share, abs=0.03 + 0.15 * share)


def test_of_labels_that_are_right_hardly_any_is_suspect(by_share):
    ((_, found),) = by_share[0]
    assert len(found.suspects) <= 2 and found.noise_rate < 0.01


def test_the_power_is_the_share_of_wrong_labels_that_is_found(by_share):
    for wrong, found in by_share[0.1]:
        assert float(wrong[found.suspects].sum() / wrong.sum()) == pytest.approx(found.power, abs=0.2)


def test_a_model_that_knows_too_little_is_weak_and_has_no_suspects(sample, table):
    labels = swapped(sample["train"].features.labels, 0.1, 0)
    found = quality_of(table, labels, noise=6 * float(table.std()))
    assert found.weak and found.power < 0.2 and not len(found.suspects)


def test_of_many_classes_a_model_that_knows_none_takes_no_right_label_for_wrong():
    labels = torch.arange(1000).repeat_interleave(3)
    features = torch.randn(len(labels), 1, 64, generator=torch.Generator().manual_seed(0)).abs()
    recipe = RECIPE | {"num_classes": 1000, "lrs": [0.005] * 3}
    found = score_labels_out_of_fold(features, labels, torch.arange(len(labels)), **recipe)
    assert found.agreement < 0.05 and found.weak and not len(found.suspects)


def test_the_order_is_that_of_cleanlabs_self_confidence(sample, table):
    labels = swapped(sample["train"].features.labels, 0.05, 1)
    fold = assign_folds(labels, torch.arange(len(labels)))
    logits = train_fold_heads(table, labels, fold, **RECIPE, seed=0)[torch.arange(len(labels))]
    found = score_labels(logits, labels)
    probs = (logits.double() / found.temperature).softmax(1).numpy()
    theirs = get_label_quality_scores(labels.numpy(), probs, method="self_confidence")
    assert found.confidence.argsort().tolist() == theirs.argsort().tolist()
    assert (found.error_prob.argsort(descending=True)[:10] == found.confidence.argsort()[:10]).all()


def test_the_error_probability_is_bayes_rule_for_the_rate_and_the_temperature_that_made_the_labels():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(4000, 3, generator=generator)
    labels = swapped(logits.softmax(1).multinomial(1, generator=generator)[:, 0], 0.1, 0, 3)
    found = score_labels(2 * logits, labels)  # twice as confident as it should be
    assert found.noise_rate == pytest.approx(0.1, abs=0.02) and found.temperature == pytest.approx(2, rel=0.15)
    q = (2 * logits.double() / found.temperature).softmax(1)[torch.arange(4000), labels]
    odds = found.noise_rate / 2 * (1 - q) / ((1 - found.noise_rate) * q)  # any of the two others
    assert torch.allclose(found.confidence, q) and torch.allclose(found.error_prob, odds / (1 + odds))


@pytest.mark.parametrize(("power", "least"), [(0.1, 0), (1, 0), (2, 0.1), (3, 0.3), (9, 0.45)])
def test_the_noise_rate_is_the_likeliest_that_a_grid_finds(power, least):
    q = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** power
    shares = torch.arange(0, 0.5, 0.001, dtype=torch.float64)[:, None]
    likelihood = ((1 - shares) * q + shares * (1 - q) / 4).log().sum(1) + 20 * (1 - shares[:, 0]).log()
    assert least <= fit_noise_rate(q, 5) == pytest.approx(float(shares[likelihood.argmax()]), abs=0.001)


def test_the_power_is_the_share_of_other_labels_that_bayes_rule_would_doubt():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(500, 4, generator=generator)
    labels = swapped(logits.softmax(1).multinomial(1, generator=generator)[:, 0], 0.2, 0, 4)
    found = score_labels(logits, labels)
    q, rate = (logits.double() / found.temperature).softmax(1), found.noise_rate
    doubted = rate * (1 - q) / 3 / ((1 - rate) * q + rate * (1 - q) / 3) > 0.5
    others = torch.ones_like(doubted).scatter(1, labels[:, None], False)
    assert (
        rate > 0.05 and found.power == pytest.approx(float(doubted[others].double().mean())) and 0.1 < found.power < 1
    )


def test_a_single_class_has_no_suspects():
    found = score_labels(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))
    assert found.weak and found.error_prob.tolist() == [0] * 4


def test_of_a_long_list_sorted_by_class_all_parts_have_a_say(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(4000, 4, generator=generator)
    labels = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
    labels[2000:] = torch.where(torch.rand(2000, generator=generator) < 0.3, 3 - labels[2000:], labels[2000:])
    whole = score_labels(logits, labels)
    monkeypatch.setattr(label_errors, "MAX_LOGITS", 4000)  # a quarter of the images
    monkeypatch.setattr(label_errors, "PART", 300)
    part = score_labels(logits, labels)
    assert part.noise_rate == pytest.approx(whole.noise_rate, abs=0.04) and whole.noise_rate > 0.1
    assert torch.allclose(part.confidence, whole.confidence, atol=0.1)


def test_of_many_classes_not_all_logits_are_kept(monkeypatch):
    count, features, labels = 24_000, torch.randn(24_000, 1, 16), torch.arange(24_000) % 1000
    weights = torch.randn(16, 10 * 1000), torch.zeros(10 * 1000)
    monkeypatch.setattr(
        label_errors, "train_fold_heads", lambda table, labels, fold, **_: FoldHeads(table, fold, *weights, 1000, 1)
    )
    monkeypatch.setattr(label_errors, "MAX_LOGITS", 100_000)
    work = lambda: score_labels_out_of_fold(  # noqa: E731
        features, labels, torch.arange(count), num_classes=1000, lrs=[0.005], batch_size=64
    )
    assert growth(work) < 0.8 * 4 * count * 1000


def test_of_very_many_images_and_classes_heads_are_trained_on_a_part_and_judge_all(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1200) % 4
    features = 3 * torch.randn(4, 16, generator=generator)[labels] + torch.randn(1200, 16, generator=generator)
    changed = swapped(labels, 0.05, 0, 4)
    trained_on = []

    def watched(*args, train_rows, **options):
        trained_on.append((len(train_rows), int(args[2].max()) + 1))
        return train_fold_heads(*args, train_rows=train_rows, **options)

    monkeypatch.setattr(label_errors, "train_fold_heads", watched)
    monkeypatch.setattr(label_errors, "MOST_TRAINED", 2400)
    found = score_labels_out_of_fold(
        features[:, None], changed, torch.arange(1200), num_classes=4, lrs=[0.005] * 20, batch_size=64
    )
    assert trained_on == [(300, 2)] * 2 and label_errors.trainable(60, 4) == (60, 10)
    assert set(found.suspects.tolist()) == set((labels != changed).nonzero().flatten().tolist())
    assert (found.suggested[changed != labels] == labels[changed != labels]).all()
