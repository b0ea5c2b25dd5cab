"""LibriSpeech from the network, and what is wrong with a source of audio.

    python -m tools.librispeech download train-clean-100 [--to DIR]   # run again to go on
    python -m tools.librispeech check PATH...                         # reads every file whole

`check` ends with exit code 1 if it finds a problem. train-clean-100 takes 6 GB and, unpacked,
as much again; dev-clean and test-clean 0.3 GB each.
"""

import hashlib
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

from torchaudio.datasets import librispeech
from tqdm import tqdm

import data
from tools import sources
from tools.command_line import Parser, UserError, one_line_errors


# ---------------------------------------- download


def download(part, folder):
    """Fetch, verify and unpack a part of LibriSpeech (CC BY 4.0) -> its folder

    A broken download goes on where it stopped. Raises UserError.
    """
    parts = {}
    for url, checksum in librispeech._CHECKSUMS.items():
        parts[Path(url).name.removesuffix(".tar.gz")] = (url, checksum)
    if part not in parts:
        raise UserError(f"LibriSpeech has no part {part!r}; choose one of {', '.join(parts)}")
    url, checksum = parts[part]

    # An empty file marks a part that has been unpacked whole.
    unpacked = Path(folder).expanduser() / "LibriSpeech" / part
    complete = unpacked / ".complete"
    if complete.exists():
        return unpacked
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    archive = unpacked.parent.parent / f"{part}.tar.gz.part"
    fetch(url, archive)
    digest = hashlib.sha256()
    with open(archive, "rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    if digest.hexdigest() != checksum:
        archive.unlink()
        raise UserError(f"{archive}: wrong checksum, so it was deleted; run the same command again")
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked.parent.parent, filter="data")
    complete.touch()
    archive.unlink()
    return unpacked


def fetch(url, path):
    """Append to a file what it lacks of what is at `url`."""
    path.touch()
    have = path.stat().st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            # 206 is the rest; some servers send everything anew.
            mode = "ab" if response.status == 206 else "wb"
            with open(path, mode) as file:
                receive(response, file)
    except urllib.error.HTTPError as error:
        # 416: nothing is missing.
        if error.code != 416:
            raise UserError(f"{url}: error {error.code}, {error.reason}; try again later")
    except OSError as error:
        have = path.stat().st_size
        raise UserError(f"{url}: {error}; run the same command again to go on from {have} bytes")


def receive(response, file):
    """Copy a response to a file, with a progress bar. Raises OSError if it ends early."""
    begin = file.tell()
    total = begin + int(response.headers.get("Content-Length", 0))
    name = Path(file.name).name
    with tqdm(desc=name, total=total, initial=begin, unit="B", unit_scale=True) as bar:
        while block := response.read(1 << 20):
            file.write(block)
            bar.update(len(block))
    if file.tell() < total:
        raise OSError("the connection ended early")


# ---------------------------------------- check


def check(source):
    """Read every file of a source whole -> (list of its usable utterances, list of problems)"""
    try:
        listed, problems = sources.scan(source)
    except UserError as error:
        return [], [str(error)]
    utterances = []
    first_with = {}
    for u in tqdm(listed, str(source), unit="file"):
        try:
            waveform = data.load_audio(u.path, u.offset, u.seconds)
            if waveform.abs().max() < data.SILENT:
                raise UserError(f"{u.path}: silence")
            if u.text is not None and not data.normalise(u.text):
                raise UserError(f"{u.path}: its transcript is empty")
            if u.seconds > data.LONGEST:
                limit = f"training uses at most {data.LONGEST:.0f} s"
                raise UserError(f"{u.path}: {u.seconds:.0f} s; {limit}, cut it up")
            # Copies have other names, but the same samples.
            samples = hashlib.sha1(waveform.numpy()).digest()
            first = first_with.setdefault(samples, u)
            if first is not u:
                raise UserError(f"{u.path}: the same audio as {first.path} ({u.id}, {first.id})")
            utterances.append(u)
        except UserError as error:
            problems.append(str(error))
    return utterances, problems


def describe(utterances):
    """One line: how many, how long, which characters"""
    seconds = sorted(u.seconds for u in utterances)
    median = seconds[len(seconds) // 2]
    texts = [u.text for u in utterances if u.text is not None]
    characters = "".join(sorted(set("".join(map(data.normalise, texts))))) or "none"
    return (
        f"{data.summary(utterances)}, {seconds[0]:.1f} to {seconds[-1]:.1f} s (median "
        f"{median:.1f}), {len(texts)} transcribed, characters: {characters}"
    )


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("command", choices=("download", "check"))
    parser.add_argument("what", nargs="+", help="parts to download, or sources to check")
    parser.add_argument("--to", default=".", help="where LibriSpeech/ shall lie (default: here)")
    args = parser.parse_args(argv)

    if args.command == "download":
        for part in args.what:
            print(f"{download(part, args.to)} is ready")
        return 0
    count = 0
    for source in args.what:
        utterances, problems = check(source)
        print("\n".join(problems) or f"{source}: nothing wrong")
        if utterances:
            print(f"{source}: {describe(utterances)}")
        count += len(problems)
    print(f"{count} problem{'s' * (count != 1)}")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
