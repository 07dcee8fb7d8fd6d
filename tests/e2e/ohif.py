"""OHIF in a browser, used as a person would: what is clicked, and what can be seen."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page, Response, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
_FLAGS = (
    "--no-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_WAIT_MS = 30_000
_BRIGHT, _COLOURED = 170, 20


@contextmanager
def browser_page() -> Iterator[Page]:
    """A page of a new headless Chromium that renders WebGL in software."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(_WAIT_MS)
        yield page
        browser.close()


class Viewer:
    """OHIF as our server offers it.

    Args:
        page: of a browser.
        server: address of the server.
        pictures: folder for screenshots.
    """

    def __init__(self, page: Page, server: str, pictures: Path) -> None:
        self._page, self._server, self._pictures = page, server, pictures

    def picture(self, name: str) -> None:
        """Keep a screenshot."""
        self._page.screenshot(path=self._pictures / f"ohif-{name}.png")

    def open_from_list(self, patient: str, mode: str) -> None:
        """Find a patient in the list of studies and open the study in a mode."""
        self._page.goto(f"{self._server}/ohif/")
        self._page.locator("td span", has_text=patient).click()
        self._page.get_by_role("link", name=mode).click()
        self._viewports.first.wait_for()

    @property
    def address(self) -> str:
        """What the browser shows in its address bar."""
        return self._page.url

    def accept_warning(self) -> None:
        """Close the note that OHIF is for research."""
        self._page.goto(f"{self._server}/ohif/")
        self._page.locator("[data-cy=confirm-and-hide-button]").click()

    # MONAI Label mode

    def connect(self) -> None:
        """Connect the MONAI Label panel to the server."""
        address = self._page.locator("#monailabelServerURL")
        address.fill(self._server)
        address.locator("xpath=following::button[1]").click()
        self._page.get_by_text("Auto-Segmentation").wait_for()

    def run(self) -> Response:
        """Run the segmentation of the open image; return what the server answered, once the notice of it is gone."""
        with self._page.expect_response(lambda answer: "/infer/" in answer.url) as answered:
            self._page.get_by_title("Run Segmentation", exact=True).click()
        notice = self._page.get_by_text("Successful" if answered.value.ok else "Failed to Run Segmentation")
        notice.wait_for()
        notice.wait_for(state="hidden")
        return answered.value

    def choose(self, option: str, value: str) -> None:
        """Choose an option of the segmentation."""
        self._page.get_by_text("Options / Configurations").click()
        self._page.locator(".optionsConfigTable tr", has_text=option).locator("select").select_option(value)
        self._page.get_by_text("Confirm", exact=True).click()

    def next_sample(self) -> None:
        """Ask for the next image and open it."""
        self._open_active_learning()
        self._page.get_by_role("button", name="Next Sample").click()
        self._page.once("dialog", lambda question: question.accept())
        with self._page.expect_navigation():
            self._page.get_by_text("OK", exact=True).click()
        self._viewports.first.wait_for()

    def start_training(self) -> None:
        """Press *Update Model*."""
        self._open_active_learning()
        self._page.get_by_role("button", name="Update Model").click()
        self._page.get_by_role("button", name="Stop Training").wait_for()

    def stop_training(self) -> None:
        """Press *Stop Training*."""
        self._page.get_by_role("button", name="Stop Training").click()
        self._page.get_by_role("button", name="Update Model").wait_for()

    def _open_active_learning(self) -> None:
        if not self._page.get_by_role("button", name="Next Sample").is_visible():
            self._page.get_by_text("Active Learning", exact=True).click()

    # Segmentation mode

    def add_segmentation(self, name: str) -> None:
        """Begin a new segmentation of the open image with one segment of that name."""
        self._page.get_by_text("Add Segmentation").click()
        self._page.locator("[data-cy=data-row]").get_by_label("Actions").click()
        self._page.get_by_role("menuitem", name="Rename").click()
        self._page.locator("[data-cy=input-annotation]").fill(name)
        self._page.get_by_text("Save", exact=True).click()

    def load_segmentation(self, description: str) -> None:
        """Load a stored segmentation into the viewport and choose its first segment."""
        self._page.get_by_text(description).first.dblclick()
        self._page.get_by_text("Yes", exact=True).click()
        self._page.locator("[data-cy=data-row]").first.click()

    def show_slice(self, number: int) -> None:
        """Turn the mouse wheel until the viewport shows a slice (counted from 0), and stays there."""
        shown = self._page.locator("[data-cy=viewport-overlay-bottom-right]").first
        self._viewports.first.hover()
        arrived = False
        for _ in range(200):
            current = int(shown.inner_text().split("(")[1].split("/")[0]) - 1
            if current == number and arrived:
                return
            arrived = current == number
            if not arrived:
                self._page.mouse.wheel(0, 100 if current < number else -100)
            self._page.wait_for_timeout(1000 if arrived else 100)
        raise AssertionError(f"The viewport does not show slice {number}, but {shown.inner_text()}")

    def dab(self, tool: str, radius_mm: float, shape: str = "Sphere") -> None:
        """Touch the middle of what is bright in the viewport with the brush or the eraser.

        Args:
            tool: `Brush` or `Eraser`.
            radius_mm: of the tool.
            shape: `Sphere` touches neighbouring slices as well, `Circle` this slice only.
        """
        self._page.locator(f"[data-cy={tool}]").click()
        self._page.get_by_text(shape, exact=True).click()
        self._page.locator("input[type=number]").first.fill(f"{radius_mm}")
        self._page.keyboard.press("Tab")
        x, y = self._middle_of_bright()
        self._page.mouse.move(x - 3, y)
        self._page.mouse.down()
        self._page.mouse.move(x, y, steps=3)
        self._page.mouse.up()
        self._page.wait_for_timeout(500)

    def open_export_menu(self) -> None:
        """Open the menu of the segmentation where its exports are."""
        self._page.get_by_role("combobox").last.locator("xpath=preceding::button[1]").click()
        self._page.get_by_role("menuitem", name="Export & Download").hover()
        self._page.get_by_role("menuitem", name="Export DICOM SEG").wait_for()

    def export(self, description: str) -> None:
        """Store the segmentation on the DICOM server under a series description; the export menu is open."""
        self._page.get_by_role("menuitem", name="Export DICOM SEG").press("Enter")
        self._page.locator("[data-cy=input-undefined]").fill(description)
        with self._page.expect_response(lambda answer: answer.request.method == "POST") as stored:
            self._page.get_by_text("Save", exact=True).click()
        assert stored.value.ok, stored.value.text()
        self._page.get_by_text("Segmentation saved successfully").wait_for()

    def download(self) -> Path:
        """Download the segmentation as a DICOM file; the export menu is open."""
        with self._page.expect_download() as downloaded:
            self._page.get_by_role("menuitem", name="Download DICOM SEG").press("Enter")
        return Path(downloaded.value.path())

    # What can be seen

    @property
    def _viewports(self) -> Locator:
        return self._page.locator("[data-cy=viewport-pane]")

    def overlays(self) -> list[int]:
        """How many pixels of each viewport are redder than green: a label; the image is grey, texts are cyan."""
        shown = [_pixels(viewport) for viewport in self._viewports.all()]
        return [int((pixels[..., 0] - pixels[..., 1] > _COLOURED).sum()) for pixels in shown]

    def says(self, sentence: str) -> bool:
        """Whether a sentence can be read now or soon; it is gone afterwards."""
        notice = self._page.get_by_text(sentence)
        notice.wait_for()
        notice.wait_for(state="hidden")
        return True

    def _middle_of_bright(self) -> tuple[float, float]:
        viewport = self._viewports.first
        box = viewport.bounding_box()
        rows, columns = np.nonzero(_pixels(viewport)[..., 0] > _BRIGHT)
        assert rows.size, "Nothing in the viewport is bright."
        return box["x"] + columns.mean(), box["y"] + rows.mean()


def _pixels(element: Locator) -> np.ndarray:
    """What an element looks like, (rows, columns, 3)."""
    return np.asarray(Image.open(io.BytesIO(element.screenshot())).convert("RGB")).astype(int)
