"""What the benchmarks share: markdown tables, and the file that they go to."""

import os
import platform
import shlex
import sys
from pathlib import Path

import torch


def table(titles, rows):
    """Markdown of a table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def publish(title, text, output):
    """Print the text; write it to a file too, with the command that made it and the machine, if there is a file."""
    print(text)
    if output:
        command = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
        machine = f"{os.cpu_count()} × {processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        Path(output).write_text(f"# {title}\n\nMade by `{command}` on {machine}.\n\n{text}\n")


def processor():
    """Name of the processor as far as the system tells it."""
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return names[0].split(": ")[1].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
