"""What is left to do once MONAI Label's packages are installed; run with the Python of their environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

STAND_IN = '''"""In place of torchvision, whose wheels want another torch: MONAI Label imports two functions of it."""


def make_grid(*args, **kwargs):
    raise ImportError("torchvision is not installed here")


save_image = make_grid
'''


def main() -> None:
    """Remove what gets in the way, and see to it that MONAI Label can be imported."""
    packages = Path(sysconfig.get_paths()["purelib"])
    # MONAI Label installs its tests as a package of that name, which would be found before anybody else's.
    shutil.rmtree(packages / "tests", ignore_errors=True)
    works = [sys.executable, "-c", "import torchvision.utils"]
    if subprocess.run(works, capture_output=True, check=False).returncode:
        pip = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"]
        subprocess.run(pip, capture_output=True, check=True)
        (packages / "torchvision").mkdir(exist_ok=True)
        (packages / "torchvision" / "__init__.py").write_text("")
        (packages / "torchvision" / "utils.py").write_text(STAND_IN)
    subprocess.run([sys.executable, "-c", "import monailabel.app"], check=True)


if __name__ == "__main__":
    main()
