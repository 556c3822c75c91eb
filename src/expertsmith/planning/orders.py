"""Plans of methods that give an order of removal."""

from __future__ import annotations

from collections.abc import Mapping

from expertsmith.errors import UserError
from expertsmith.experts.rules import Rules, refuse_groups
from expertsmith.methods.base import Order
from expertsmith.planning.budgets import SEARCHED
from expertsmith.planning.job import Job
from expertsmith.planning.plan import LayerPlan
from expertsmith.planning.searching import searched
from expertsmith.planning.work import measured


def by_order(job: Job) -> dict[int, LayerPlan]:
    """Remove from the front of each layer's order, as many as the budget says."""
    options = {name: value for name, value in job.values.items() if name not in job.method.measure_options}
    orders: dict[int, Order] = {
        layer: job.method.function(arrays, job.facts(layer), **options) for layer, arrays in measured(job)
    }
    if job.budget == "threshold":
        removed = {layer: order.stop for layer, order in orders.items()}
    elif job.budget == "uniform":
        removed = {layer: job.rules[layer].num_experts - job.count(layer) for layer in orders}
    elif job.budget in SEARCHED:

        def left(counts: Mapping[int, int]) -> dict[int, list[int]]:
            gone = {n: orders[n].experts[: job.rules[n].num_experts - count] for n, count in counts.items()}
            return {n: [e for e in range(job.rules[n].num_experts) if e not in gone[n]] for n in counts}

        counts = searched(job, left, {layer: len(order.experts) for layer, order in orders.items()})
        removed = {layer: job.rules[layer].num_experts - count for layer, count in counts.items()}
    else:
        refuse_groups(job.rules)
        total = sum(job.rules[layer].num_experts - job.count(layer) for layer in orders)
        removed = _by_height(orders, total, {layer: job.rules[layer] for layer in orders})
    entries = {}
    said: list[tuple[str, int]] = []
    for layer, order in orders.items():
        n = job.rules[layer].num_experts
        gone = set(order.experts[: removed[layer]])
        if len(order.experts) < removed[layer]:
            raise UserError(f"decoder layer {layer}: the method can remove at most {len(order.experts)} of {n} experts")
        why = {**order.why, "order": order.experts, "height": order.height}
        said += [(text, layer) for text in why.get("warnings", ())]
        if job.budget == "threshold" and why.get("guard"):
            least = job.rules[layer].least
            said.append((f"the threshold would keep fewer experts than the router needs, so {least} are kept", layer))
        entries[layer] = LayerPlan(layer=layer, num_experts=n, keep=[e for e in range(n) if e not in gone], why=why)
    job.say(said)
    return entries


def _by_height(orders: Mapping[int, Order], total: int, rules: Mapping[int, Rules]) -> dict[int, int]:
    """Removals a layer, `total` in all: from the layer whose next removal is highest (on a tie the lower layer), never below the floor."""
    removed = dict.fromkeys(orders, 0)
    for _ in range(total):
        open_layers = [
            layer
            for layer, order in orders.items()
            if removed[layer] < min(len(order.experts), rules[layer].num_experts - rules[layer].least)
        ]
        if not open_layers:
            break
        best = max(open_layers, key=lambda layer: (orders[layer].height[removed[layer]], -layer))
        removed[best] += 1
    return removed
