"""Does the SAM2 part of nano work alone? Fresh synthetic patients: supports of one, queries of another, memory only."""

import torch
from support import nano, rounded, write

from ofl_sam2.backbone.load import load_backbone
from ofl_sam2.training.episodes import unroll
from ofl_sam2.training.pretraining import mean_dice, to_episode
from ofl_sam2.training.synthetic_episodes import SyntheticEpisodes

BATCHES, SEED = 40, 987654


@torch.no_grad()
def main() -> None:
    backbone, learner = load_backbone("nano"), nano().learner
    batches = iter(SyntheticEpisodes(backbone.image_size, episodes=2, objects=3, supports=(4, 4), seed=SEED))
    dice: dict[str, list[float]] = {"memory only": [], "with learner": []}
    for _ in range(BATCHES):
        episode = to_episode(backbone, next(batches))
        for name, used in (("memory only", None), ("with learner", learner)):
            outputs = unroll(backbone, used, episode)
            dice[name] += [mean_dice(*pair) for pair in zip(outputs, episode.query_masks, strict=True)]
    means = {name: torch.tensor(values).nanmean().item() for name, values in dice.items()}
    print(means)
    write("synthetic_gate", {"batches": BATCHES, "supports": 4, "dice": rounded(means)})


if __name__ == "__main__":
    main()
