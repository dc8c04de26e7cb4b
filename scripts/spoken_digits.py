"""Make recordings of one to seven spoken digits with espeak-ng, in many voices and with noise.

    python scripts/spoken_digits.py OUT [--train N] [--validation N] [--test N] [--seed SEED]

It needs the program espeak-ng (`apt install espeak-ng`) and the extra `audio`. A voice is an
English accent with a speaker variant (`espeak-ng --voices=variant`). Validation and test use
speakers that are not in the training data: whole families of variants are held out, such as steph,
steph2 and steph3. Speed, pitch, loudness and noise are random for each sequence, and training
recordings are also sped up or slowed down (Ko et al. 2015). The script writes OUT/SPLIT/N.flac and
OUT/SPLIT/metadata.csv, which the source audio:OUT/SPLIT reads; one_digit.csv lists the recordings
of a single digit.
"""

from __future__ import annotations

import argparse
import csv
import io
import random
import subprocess
from collections.abc import Sequence
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = (
    "en-us",
    "en-gb",
    "en-gb-scotland",
    "en-gb-x-rp",
    "en-gb-x-gbclan",
    "en-029",
    "en-us-nyc",
)
SPEAKERS = {
    "test": "steph steph2 steph3 edward edward2 iven iven2 iven3 iven4 Andrea linda victor f5 m8 "
    "pablo miguel boris",
    "validation": "Gene Gene2 belinda travis marcelo zac anika f4 m7",
    "train": "Alex Alicia Andy Annie AnxiousAndy Denis Diogo Henrique Hugo Jacky Lee Marco Mario "
    "Michael Mike Nguyen RicishayMax RicishayMax2 RicishayMax3 Storm Tweaky adam announcer antonio "
    "aunty benjamin caleb david ed f1 f2 f3 grandma grandpa gustave john kaukovalta klatt klatt2 "
    "klatt3 klatt4 klatt5 klatt6 m1 m2 m3 m4 m5 m6 max michel norbert paul pedro quincy rob robert "
    "robosoft robosoft2 robosoft3 robosoft4 robosoft5 robosoft6 sandro shelby",
}
RATE, SECONDS = 16_000, 3.2  # of a recording; a longer one is drawn again
SPEEDS = range(84, 119, 2)  # per cent; a recording sped up sounds of a smaller speaker
NOISES = (None, 30, 20, 15, 10, 5)  # dB from the voice to the noise
COLOURS = (0.0, 0.5, 1.0)  # amplitudes fall with this power of the frequency: white to red


def speak(folder: Path, split: str, seed: int, number: int) -> tuple[str, str, str, str]:
    """Write a recording; return its row of the manifest: file, text, voice and dB of the noise.

    Args:
        folder: folder of the split.
        split: name of the split, which chooses the speakers.
        seed: seed of the data set.
        number: number of the recording.
    """
    draw = random.Random(f"{seed} {split} {number}")
    while True:
        text = " ".join(draw.choices(DIGITS, k=draw.randint(1, 7)))
        voice = f"{draw.choice(ACCENTS)}+{draw.choice(SPEAKERS[split].split())}"
        options = ["-s", draw.randint(150, 260), "-p", draw.randint(25, 75), "-v", voice]
        words = ["espeak-ng", *map(str, options), "--stdout", text]
        spoken = subprocess.run(words, check=True, capture_output=True, timeout=60).stdout
        samples, rate = soundfile.read(io.BytesIO(spoken))
        speed = draw.choice(SPEEDS) if split == "train" else 100
        samples = resample_poly(samples, RATE, rate * speed // 100)
        if 0.2 * RATE < len(samples) < SECONDS * RATE:
            break
    noise, colour = draw.choice(NOISES), draw.choice(COLOURS)
    samples *= 10 ** draw.uniform(-1.2, 0) * 0.5 / np.abs(samples).max()
    if noise is not None:
        random_numbers = np.random.default_rng(draw.getrandbits(63))
        samples += noise_like(samples, noise, colour, random_numbers)
    name = f"{number:05}.flac"
    soundfile.write(folder / name, np.clip(samples, -1, 1), RATE)
    return name, text, voice, "clean" if noise is None else str(noise)


def noise_like(
    samples: np.ndarray, decibels: float, colour: float, rng: np.random.Generator
) -> np.ndarray:
    """Return noise that is so many decibels below the samples in power.

    Args:
        samples: samples of the voice, [n].
        decibels: ratio of the powers of voice and noise.
        colour: amplitudes fall with this power of the frequency.
        rng: random generator.
    """
    spectrum = np.fft.rfft(rng.normal(size=len(samples)))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1) ** colour
    noise = np.fft.irfft(spectrum, len(samples))
    power = np.mean(samples**2) / 10 ** (decibels / 10)
    return noise * np.sqrt(power / np.mean(noise**2))


def write_split(folder: Path, split: str, n: int, seed: int) -> None:
    """Write the recordings of a split and their manifest."""
    folder.mkdir(parents=True)
    with Pool() as pool:
        rows: Sequence = pool.map(partial(speak, folder, split, seed), range(n), chunksize=16)
    for name, chosen in (
        ("metadata", rows),
        ("one_digit", [row for row in rows if row[1] in DIGITS]),
    ):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("file_name", "target", "voice", "noise"), *chosen])


def main() -> None:
    """Write the data set."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    for split, n in (("train", 12000), ("validation", 300), ("test", 600)):
        parser.add_argument(f"--{split}", type=int, default=n)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for split in SPEAKERS:
        write_split(args.out / split, split, getattr(args, split), args.seed)


if __name__ == "__main__":
    main()
