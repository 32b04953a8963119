# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Draws the README's figure: one Mixture-of-Experts layer beside one Chain-of-Experts layer at equal compute.

python train/studies/draw_chain.py model_cards/chain.png
"""

import argparse

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from modeling_coe.train.report import save_picture


INK, FAINT, FIRST, SECOND = "#22303c", "#c9d2da", "#2f7ebc", "#e07b39"
POOL = 16
CHOSEN_BY_MOE = (1, 4, 10, 13)
CHOSEN_IN_ITERATION = ((1, 10), (6, 13))


def box(axes, x, y, width, height, text="", face="white", edge=INK, color=INK, size=10):
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=1.2)
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=color)


def arrow(axes, start, end, color=INK, bend=0.0):
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, color=color, linewidth=1.3,
            connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def pool(axes, y, chosen, color):
    """The N experts of the layer in one row; the chosen ones filled."""
    for expert in range(POOL):
        picked = expert in chosen
        axes.add_patch(
            FancyBboxPatch(
                (0.5 + expert * 0.44, y), 0.34, 0.34, boxstyle="round,pad=0,rounding_size=0.05",
                facecolor=color if picked else "white", edgecolor=color if picked else FAINT, linewidth=1.1,
            )
        )  # fmt: skip


def iteration(axes, y, chosen, color, label, pool_label):
    """One routed pass, drawn upwards from height y: router, pool, sum. Returns the height of its output."""
    box(axes, 3.0, y, 2.0, 0.42, label, edge=color, color=color)
    pool(axes, y + 0.85, chosen, color)
    axes.text(0.35, y + 1.02, pool_label, fontsize=9, color=INK, ha="right", va="center")
    for expert in chosen:
        centre = 0.67 + expert * 0.44
        arrow(axes, (4.0, y + 0.42), (centre, y + 0.85), color)
        arrow(axes, (centre, y + 1.19), (4.0, y + 1.66), color)
    axes.text(4.0, y + 1.8, "+", ha="center", va="center", fontsize=13, color=INK,
              bbox={"boxstyle": "circle,pad=0.12", "facecolor": "white", "edgecolor": INK})  # fmt: skip
    return y + 1.8


def panel(axes, title, subtitle):
    axes.set(xlim=(-1.2, 8.6), ylim=(-0.35, 7.0))
    axes.axis("off")
    axes.text(4.0, 6.7, title, ha="center", fontsize=13, fontweight="bold", color=INK)
    axes.text(4.0, 6.3, subtitle, ha="center", fontsize=9.5, color=INK)


def residual(axes, start, end, text, x=7.9):
    axes.plot([4.0, x, x], [start, start, end], color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
    arrow(axes, (x, end), (4.22, end))
    axes.text(x + 0.12, (start + end) / 2, text, fontsize=9, color=INK, rotation=90, va="center")


def draw(path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2))
    panel(left, "Mixture-of-Experts", "2K of N experts, once: none sees what another computed")
    box(left, 3.0, 0.0, 2.0, 0.42, "norm(h)")
    arrow(left, (4.0, 0.42), (4.0, 1.7))
    top = iteration(left, 1.7, CHOSEN_BY_MOE, FIRST, "router", "N\nexperts")
    arrow(left, (4.0, top + 0.2), (4.0, 5.9))
    left.text(4.15, 5.75, "added to h", fontsize=9, color=INK)

    panel(
        right,
        "Chain-of-Experts, C = 2",
        "K of the same N experts, twice: the second visit works on the result of the first",
    )
    box(right, 3.0, 0.0, 2.0, 0.42, "norm(h) = x₀")
    arrow(right, (4.0, 0.42), (4.0, 0.9))
    middle = iteration(right, 0.9, CHOSEN_IN_ITERATION[0], FIRST, "router 1", "N\nexperts")
    residual(right, 0.66, middle, "x₀")
    arrow(right, (4.0, middle + 0.2), (4.0, 3.35))
    top = iteration(right, 3.35, CHOSEN_IN_ITERATION[1], SECOND, "router 2", "the same\nN experts")
    residual(right, 3.12, top, "x₁")
    arrow(right, (4.0, top + 0.2), (4.0, 5.9))
    right.text(4.15, 5.75, "x₂ - x₀ is added to h", fontsize=9, color=INK)
    figure.tight_layout(w_pad=0.5)
    save_picture(figure, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="where the PNG goes")
    draw(parser.parse_args().path)
