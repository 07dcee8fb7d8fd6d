"""The command line: `ofl-sam2`, or `python -m ofl_sam2`."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ofl_sam2 import __version__
from ofl_sam2.console import cancel_on_interrupt, err, out, peak_memory_gb, print_whole, read_results, write_json
from ofl_sam2.errors import Cancelled, InputError, OFLError

app = typer.Typer(
    help="Label a few volumes, segment the rest: SAM2 with an online few-shot learner, without prompts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
weights_app = typer.Typer(help="SAM2.1 weights: list, fetch, verify.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(weights_app, name="weights")

Images = Annotated[Path, typer.Option(help="Folder of images: .nii .nii.gz .nrrd .mha files, DICOM or frame folders.")]
Labels = Annotated[Path, typer.Option(help="Folder of label maps; a label has the name of its image.")]
Model = Annotated[Path, typer.Option(help="Folder of the learned model.")]
Cases = Annotated[str | None, typer.Option(help="Case names, separated by commas; default all with a label.")]
Structures = Annotated[str | None, typer.Option(help='What to learn, such as "1=anterior,2=posterior".')]
Backbone = Annotated[
    str | None,
    typer.Option(help="nano, or a SAM2.1 model whose weights were fetched; default that of the model, else nano."),
]
ImageSize = Annotated[int | None, typer.Option(help="Input side in pixels, a multiple of 32.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Seed = Annotated[
    int, typer.Option(help="Of everything random. A training limited by time still differs.", min=0, max=2**32 - 1)
]
Checkpoint = Annotated[Path | None, typer.Option(help="Checkpoint of an earlier run.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")]
CacheDir = Annotated[Path | None, typer.Option(help="Folder of cached features; default the user's cache.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew even if the folder holds a model.")]
CTWindow = Annotated[
    str | None,
    typer.Option(help='HU told apart in CT, such as "-1000,400"; default soft tissue, or wider for the first labels.'),
]
IgnoreEmpty = Annotated[
    bool, typer.Option("--ignore-empty-slices", help="Slices without any label are unlabelled, not empty.")
]


@app.command()
def learn(
    images: Images,
    labels: Labels,
    model: Model,
    cases: Cases = None,
    structures: Structures = None,
    backbone: Backbone = None,
    image_size: ImageSize = None,
    device: Device = "cpu",
    ignore_empty_slices: IgnoreEmpty = False,
    fresh: Fresh = False,
    ct_window: CTWindow = None,
    cache_dir: CacheDir = None,
    json: Json = None,
) -> None:
    """Learn structures from labelled volumes, in seconds. A model that exists is extended."""
    from ofl_sam2.jobs import learn_cases, open_segmenter

    started = time.perf_counter()
    with cancel_on_interrupt() as cancel:
        segmenter = open_segmenter(model, backbone, image_size, device, cache_dir, fresh, ct_window)
        result = learn_cases(segmenter, images, labels, model, _names(cases), structures, ignore_empty_slices, cancel)
    result |= {"seconds": round(time.perf_counter() - started, 2), "peak_memory_gb": round(peak_memory_gb(), 2)}
    names = ", ".join(f"{value}={name}" for value, name in result["structures"].items())
    slices = f"{result['slices']} slices of {len(result['pool'])} cases"
    out.print(f"Learned {names} from {slices} in {result['seconds']} s.")
    if not result["fitted"]:
        err.print(
            f"The learner is not fitted to {result['backbone']} yet, so SAM2's memory works alone: "
            "run 'ofl-sam2 train' before you rely on the result."
        )
    out.print(f"Model: {model}")
    write_json(json, result)


@app.command()
def train(
    images: Images,
    labels: Labels,
    model: Model,
    cases: Cases = None,
    structures: Structures = None,
    backbone: Backbone = None,
    image_size: ImageSize = None,
    device: Device = "cpu",
    ignore_empty_slices: IgnoreEmpty = False,
    fresh: Fresh = False,
    ct_window: CTWindow = None,
    cache_dir: CacheDir = None,
    minutes: Annotated[float, typer.Option(help="Time limit of the training.")] = 5.0,
    epochs: Annotated[int | None, typer.Option(help="Limit in epochs of 10 steps, if that comes first.")] = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Learn, then fit learner, fusion and a 3D U-Net to all labelled volumes, in minutes.

    A training that was killed goes on from the last epoch of the learner; its U-Net begins anew.
    """
    from ofl_sam2.jobs import learn_cases, open_segmenter, train_cases
    from ofl_sam2.training.settings import TrainingSettings

    settings = TrainingSettings(minutes=minutes, epochs=epochs, seed=seed)
    started = time.perf_counter()
    with cancel_on_interrupt() as cancel:
        segmenter = open_segmenter(model, backbone, image_size, device, cache_dir, fresh, ct_window)
        result = learn_cases(segmenter, images, labels, model, _names(cases), structures, ignore_empty_slices, cancel)
        unet = segmenter.unet
        trained = train_cases(segmenter, images, labels, model, result["cases"], settings, ignore_empty_slices, cancel)
    result |= {
        "epochs": len(trained.reports),
        "losses": [round(report.loss, 4) for report in trained.reports],
        "held_out_dice": {"before": trained.dice_before, "after": trained.dice_after},
        "improved": trained.improved,
        "unet": segmenter.unet is not None,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory_gb": round(peak_memory_gb(), 2),
    }
    out.print(f"Trained {len(trained.reports)} epochs on {len(result['cases'])} cases in {result['seconds']} s.")
    if trained.dice_before is not None and trained.dice_after is not None:
        kept = "kept" if trained.improved else "no better, so the parameters stay as they were"
        out.print(f"Dice of held-out labelled slices {trained.dice_before:.3f} -> {trained.dice_after:.3f}: {kept}.")
    if segmenter.unet is None:
        err.print(
            "No 3D U-Net is part of the model: it did not help on held-out slices, or a volume is too large for it."
        )
    elif unet is not None and segmenter.unet is not unet:
        err.print("A new 3D U-Net, fitted to these cases, takes the place of the one before; they were not compared.")
    out.print(f"Model: {model}")
    write_json(json, result)


@app.command()
def segment(
    model: Model,
    image: Annotated[
        list[Path],
        typer.Option(help="Image file, DICOM series, frame folder, or a folder of such images; may be repeated."),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the label maps.")],
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Skip images whose label map is there already; what --json says of them is kept."
        ),
    ] = False,
    device: Device = "cpu",
    cache_dir: CacheDir = None,
    json: Json = None,
) -> None:
    """Segment new images with a learned model. A label map has the grid of its image."""
    from ofl_sam2.jobs import check_all_segmented, segment_images

    earlier = read_results(json) if resume else {}

    def report(results: dict[str, Any], failures: dict[str, str]) -> None:
        memory = round(peak_memory_gb(), 2)
        write_json(json, {"results": {**earlier, **results}, "failures": failures, "peak_memory_gb": memory})

    with cancel_on_interrupt() as cancel:
        results, failures = segment_images(model, image, output, resume, device, cache_dir, cancel, report)
    out.print(f"{len(results)} label maps were written to {output}; peak memory {peak_memory_gb():.2f} GB.")
    check_all_segmented(failures)


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Option(help="Folder of predicted label maps.")],
    labels: Labels,
    cases: Cases = None,
    structures: Structures = None,
    metrics: Annotated[str, typer.Option(help="Any of dice, hd95, surface_dice, separated by commas.")] = "dice",
    tolerance: Annotated[float, typer.Option(help="Distance up to which surfaces agree in surface Dice, mm.")] = 1.0,
    ignore_empty_slices: IgnoreEmpty = False,
    json: Json = None,
) -> None:
    """Score label maps against references."""
    from ofl_sam2.atomic import atomic_write_text
    from ofl_sam2.dataset import parse_structures
    from ofl_sam2.evaluation import evaluate_folders

    names = parse_structures(structures) if structures else None
    report = evaluate_folders(
        predictions,
        labels,
        _names(cases),
        tuple(_names(metrics) or ()),
        names,
        tolerance=tolerance,
        ignore_empty_slices=ignore_empty_slices,
    )
    print_whole(report.table())
    if report.not_predicted:
        err.print(f"Without a prediction, and in no mean: {', '.join(report.not_predicted)}.")
    if report.not_scored:
        values = ", ".join(map(str, report.not_scored))
        err.print(
            f"Predictions also hold {values}, which is not scored: no reference has it, or --structures does not."
        )
    if json is not None:
        atomic_write_text(json, report.to_json())


@app.command()
def synth(
    output: Annotated[Path, typer.Option(help="Folder for images/ and labels/.")],
    cases: Annotated[int, typer.Option(help="How many patients.", min=1)],
    seed: Seed = 0,
) -> None:
    """Write synthetic labelled volumes that share a random anatomy."""
    from ofl_sam2.training.cohort import write_cohort

    names = write_cohort(output, cases, seed)
    out.print(f"{len(names)} synthetic cases are in {output}/images and {output}/labels.")


@app.command()
def pretrain(
    output: Annotated[Path, typer.Option(help="nano's weights (.safetensors); the learner's are written beside them.")],
    minutes: Annotated[float, typer.Option(help="Time budget of all stages together.")] = 60.0,
    device: Device = "cpu",
    resume: Checkpoint = None,
    further: Annotated[bool, typer.Option("--further", help="Start from the package's weights.")] = False,
    seed: Seed = 0,
) -> None:
    """Pretrain nano and its learner on synthetic volumes, from scratch or further."""
    from ofl_sam2.pretraining_jobs import pretrain_nano

    with cancel_on_interrupt() as cancel:
        steps = pretrain_nano(output, minutes, device, resume, further, seed, cancel)
    out.print(f"{steps} steps done. Weights: {output}")


@app.command()
def pretrain_unet(
    output: Annotated[Path, typer.Option(help="The U-Net's weights (.safetensors).")],
    minutes: Annotated[float, typer.Option(help="Time budget.")] = 60.0,
    device: Device = "cpu",
    resume: Checkpoint = None,
    seed: Seed = 0,
) -> None:
    """Pretrain the 3D U-Net of `train` on synthetic volumes."""
    from ofl_sam2.pretraining_jobs import pretrain_voxels

    with cancel_on_interrupt() as cancel:
        steps = pretrain_voxels(output, minutes, device, resume, seed, cancel)
    out.print(f"{steps} steps done. Weights: {output}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo_output"),
    minutes: Annotated[float, typer.Option(help="Training time; 0 learns only.")] = 3.0,
    download: Annotated[bool, typer.Option("--download", help="Fetch MSD Task04 (hippocampus) first.")] = False,
) -> None:
    """Learn from two labelled volumes, segment the others, score and picture the result."""
    from ofl_sam2.demo import run_demo

    with cancel_on_interrupt() as cancel:
        run_demo(output, minutes, download, cancel)


@weights_app.command("list")
def weights_list() -> None:
    """List the backbones and where their weights are."""
    from ofl_sam2.backbone.load import NANO_WEIGHTS
    from ofl_sam2.backbone.weights import CATALOGUE, weights_path

    out.print(f"{'nano':24s} present {NANO_WEIGHTS}")
    for name, entry in CATALOGUE.items():
        path = weights_path(name)
        here = path.is_file() and path.stat().st_size == entry.size
        out.print(f"{name:24s} {'present' if here else 'absent '} {path}")


@weights_app.command("fetch")
def weights_fetch(name: Annotated[str, typer.Argument(metavar="NAME", help="Name from 'weights list'.")]) -> None:
    """Download and verify SAM2.1 weights; an interrupted download goes on."""
    from ofl_sam2.backbone.weights import fetch

    out.print(f"{name}: {fetch(name)}")


@weights_app.command("verify")
def weights_verify(path: Annotated[Path, typer.Argument(metavar="PATH", help="A weights file.")]) -> None:
    """Identify a weights file by its sha256."""
    from ofl_sam2.backbone.weights import verify

    out.print(f"{path} is {verify(path).name}, intact.")


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError("The list of names is empty. Separate names by commas, or leave the option out.")
    return names


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 and one line for bad input, 130 when cancelled."""
    try:
        app(args=arguments, prog_name="ofl-sam2")
    except Cancelled as error:
        err.print(str(error))
        sys.exit(130)
    except (OFLError, OSError) as error:
        err.print(f"Error: {' '.join(str(error).split())}")
        sys.exit(2)
