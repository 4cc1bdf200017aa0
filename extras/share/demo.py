"""
Ask a trained model about images in the browser: what it answers, how surely, and where it looked.

    python extras/share/demo.py --run=out/sample

The page is at http://127.0.0.1:8501, for this machine alone; with a password colleagues reach it, too: docs/demo.md.
It is research software, not for clinical use. Images and questions stay in memory while the page is open: nothing is
written to the disk or sent elsewhere, at whatever --address the page is. Needs `pip install -r
extras/requirements.txt`, and for DICOM and NIfTI what docs/demo.md names.

    demo_page.py      the page, one run of it for a visitor's click
    demo_draw.py      its pictures, boxes, maps and words as HTML
    demo_images.py    from a visitor's files to the pictures that the model sees, windows and slices
    demo_talk.py      the model, and a conversation about images
    demo_line.py      who is answered next
    demo_server.py    who may reach the page, and what the server may do

Streamlit shows the page, with the settings of demo_server.server_settings(); under others the page refuses to work.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

from dataclasses import dataclass
from typing import Annotated

from plumbing.flags import Device, Form, Range, Seconds, UserError, parse_command_line, run


@dataclass(frozen=True)
class Config:
    run: str = ""  # folder of a train_vlm.py run; none: the newest in out/
    checkpoint: str = ""  # of the run: best, by held-out loss, or a name such as step_000500; none: the newest
    shards_dir: str = "shards"  # where prepare/all.py put the data whose test images are the examples
    classifier: str = ""  # folder .../seed_<n> of a train_cls.py run; none: the newest in out/cls
    address: str = "127.0.0.1"  # to listen on; another one lets other machines in, and wants --password_file
    port: Annotated[int, Range(1, 65535)] = 8501  # to listen on
    password_file: str = ""  # a file whose one line whoever opens the page has to type
    base_path: Annotated[str, Form(r"(/[\w.~-]+)*", "a path such as /medq")] = ""  # at which a proxy serves the page
    public_name: Annotated[str, Form(r"[\w.-]*", "a host's name")] = ""  # of the proxy's machine, as browsers know it
    seconds: Seconds = 60  # that an answer may take; then it is cut
    device: Device = "auto"  # cuda, mps or cpu


if __name__ == "__main__":
    CONFIG = parse_command_line(Config)  # before torch is imported: --help and a typo are answered at once

from extras.share import demo_page
from extras.share.demo_server import (MEGABYTES, require_address, require_password, server_settings, stay_here,
                                      take_files_of_admitted)
from run import open_trained_run


def main(config):
    if demo_page.st is None:
        raise UserError("no streamlit here; run `pip install -r extras/requirements.txt`")
    if demo_page.st.runtime.exists():  # it is streamlit that runs this file
        if parser := sys.modules.get("starlette.formparsers"):
            parser.MultiPartParser.spool_max_size = 2 * MEGABYTES << 20  # else through a file on disk
        try:
            return demo_page.show_page(config)
        except UserError as error:
            return demo_page.st.error(str(error))
    open_trained_run(config.run, config.checkpoint)  # say now what is wrong
    require_password(config)
    settings = {**server_settings(config), "server.port": config.port, "server.headless": True,
                "server.fileWatcherType": "none", "client.toolbarMode": "minimal", "theme.base": "light",
                "theme.primaryColor": "#0b5c7a", "theme.secondaryBackgroundColor": "#f2f6f8"}
    flags = [f"--{name}={'false' if value is False else 'true' if value is True else value}"
             for name, values in settings.items() for value in (values if isinstance(values, list) else [values])]
    require_address(config)
    from streamlit.web import cli
    host = f"[{config.address}]" if ":" in config.address else config.address
    print(f"demo.py: the page is at http://{host}:{config.port}{config.base_path}; Ctrl-C ends it", flush=True)
    stay_here(config.address)
    if config.password_file:
        take_files_of_admitted()
    cli.main(["run", __file__, *flags, "--", *sys.argv[1:]])


if __name__ == "__main__":
    run(main, CONFIG)
