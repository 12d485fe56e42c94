"""Rebuild `instructions/`: questions on the sample leads with the leads' first sentences, and human small talk.

    pip download --no-deps --dest downloads chitchat-dataset==0.9.0
    python training/sample_data/build_instructions.py downloads/chitchat_dataset-0.9.0-py3-none-any.whl

Leads: a title becomes one of several questions, the answer is the first one or two sentences. A question that needs the
grammar of its subject ("What are oceanic trenches?") takes article, number, case and tense from the lead; where the
lead does not open with its title, a form is taken that quotes it. A row is of the split that its lead is of.

Dialogues: excerpts, one speaker as the user and the other as the assistant, what one of them wrote in a row joined. An
excerpt ends before what `common_words` or `UNFIT` exclude. The split is by the hash of the dialogue's id.

What is drawn for a row depends on its title alone, so rows stay as they are when others are added.
"""

import argparse
import collections
import hashlib
import json
import random
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

SAMPLE_DATA = Path(__file__).parent
DIALOGUES = "chitchat_dataset/dataset.json"
LEADS = {"train": 7500, "test": 350}
TEST_PERCENT = 7  # of the dialogues
SCHEMA = pa.schema(
    {
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "source": pa.string(),
    }
)

# --- Leads -----------------------------------------------------------------------------------------------------------

ANSWER_WORDS = 60
# Where a full stop ends no sentence: after these, after single letters (initials), and after "U.S." and its like.
ABBREVIATION = re.compile(
    r"(?:\b(?:Dr|Mr|Mrs|Ms|St|Sts|Mt|Ft|Jr|Sr|Gen|Lt|Col|Capt|Sgt|Maj|Adm|Gov|Sen|Rep|Rev|Prof|Hon|Pres|No|Nos|vs|v|"
    r"etc|cf|ca|c|fl|r|b|d|lit|approx|est|pl|sing|pp|p|vol|ed|eds|al|Inc|Ltd|Co|Corp|Bros|Op|op|spp|sp|var|subsp|"
    r"Lat|Gr|Skt|trans|abbr|Jan|Feb|Mar|Apr|Aug|Sept|Sep|Oct|Nov|Dec|mi|ft|sq|lb|oz|in|hr|min|km|Ph|Ave|Blvd)"
    r"|\b[A-Za-z]|\b(?:[A-Za-z]\.)+[A-Za-z])\.$"
)
SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s+[\"'“‘(\[]?[A-Z0-9À-ÞĀ-ŽʿʻͰ-῿])")
# A first sentence without any of these is a fragment.
PREDICATE = re.compile(
    r"\b(?:is|are|was|were|has|have|had|can|may|refers?|consists?|describes?|means|comprises|includes?|occurs?|began|"
    r"deals|studies|concerns|took|became|served|developed|covers|contains|encompasses|involves|dates?|lasted|led)\b"
)
BEINGS = "(?:god|goddess|deity|prophet|patriarch|hero|king|queen|character|figure|titan|nymph|angel)"
# What the extraction of plain text left of removed markup, such as pronunciations.
LEFTOVER = re.compile(r"\(\s*[,;)]|\(\s|\s[,;.)](?:\s|$)|,\s*,|\[|\]|\{|\}|;\s*\)|\bIPA\b|⟨|listen\)|\.\.|=")


class Form(NamedTuple):
    """A question; `{subject}` is as within a sentence, `{title}` as it stands above an article."""

    question: str
    sentences: int
    weight: int = 1
    follow_ups: bool = False


DIRECT_FORMS = [
    Form("{Who} {verb} {subject}?", 1, 6, True),
    Form("{who} {verb} {subject}", 1, 1),
    Form("Can you tell me {who} {subject} {verb}?", 1, 2, True),
    Form("Please explain {who} {subject} {verb}.", 1, 2, True),
    Form("Tell me about {subject}.", 2, 4, True),
    Form("I would like to learn about {subject}.", 2, 2, True),
    Form("What do you know about {subject}?", 2, 2),
    Form("Describe {subject} in one sentence.", 1, 2),
    Form("Describe {subject} in two sentences.", 2, 2),
]
TITLE_FORMS = [
    Form('Write the opening of an encyclopedia article on "{title}".', 2, 2),
    Form('Write the first sentence of an encyclopedia article titled "{title}".', 1, 2),
    Form("How would an encyclopedia introduce this subject: {title}?", 2, 1),
    Form("Introduce this subject in one sentence: {title}", 1, 2),
    Form("{title}: what should I know?", 2, 1, True),
]
SYSTEM_MESSAGES = {
    1: [
        "Answer in one sentence.",
        "Keep your answers to a single sentence.",
        "You are a helpful assistant who answers briefly, in one sentence at a time.",
    ],
    2: [
        "Answer in two sentences.",
        "You are a helpful assistant who answers in the style of an encyclopedia.",
    ],
}
FOLLOW_UPS = [
    "Tell me more.",
    "Can you tell me more?",
    "Go on.",
    "What else can you say?",
    "Thanks. What else should I know?",
    "Please continue.",
]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text without line breaks; a full stop after an abbreviation or an initial ends none."""
    sentences, start = [], 0
    for match in SENTENCE_END.finditer(text):
        before = text[start : match.start() + 1]
        if text[match.start()] == "." and ABBREVIATION.search(before):
            continue
        if before.count("(") > before.count(")") or (before.count('"') % 2 and match.group()[-1] != '"'):
            continue  # within parentheses or a quotation
        sentences.append(text[start : match.end()].strip())
        start = match.end()
    return [*sentences, text[start:].strip()]


def answer_sentences(text: str) -> list[str]:
    """The sentences of a lead's first paragraph up to the first that is not fit to stand in an answer."""
    paragraph = re.sub(r"\s+", " ", text.split("\n")[0]).strip()
    fit = []
    for sentence in split_sentences(paragraph):
        if LEFTOVER.search(sentence) or sentence[-1:] not in tuple('.!?"”)') or len(sentence.split()) < 4:
            break
        if sentence.count("(") != sentence.count(")") or sentence.count('"') % 2:
            break
        fit.append(sentence)
    return fit


def is_person(lead: dict, common: set[str]) -> bool:
    """Whether to ask "Who": by the topic, or by what the first words say of a subject with a proper name."""
    if lead["topic"] == "People":
        return True
    capitalised = all(word[0].isupper() for word in re.findall(r"[^\W\d_]{4,}", lead["title"]))
    if not capitalised or lead["title"].lower() in common:
        return False
    if lead["topic"] == "Uncategorized":
        return bool(re.search(r"[.] (?:He|She|His|Her) ", lead["text"]))
    return bool(
        re.match(rf"{re.escape(lead['title'])}\b[^.]{{0,80}}? (?:is|was) [^.,]{{0,50}}\b{BEINGS}\b", lead["text"])
    )


class Subject(NamedTuple):
    words: str
    verb: str


def find_subject(lead: dict, sentence: str, common: set[str]) -> Subject | None:
    """How the first sentence names its subject, and the verb after it; None where it opens with other words."""
    name = re.sub(r" \(.*\)$", "", lead["title"])
    aside = r"(?:,[^,]*,|,? or [^,]{1,40}?,?| \([^)]*\))*"
    if is_person(lead, common):
        verb = re.search(r"\b(is|was|are|were)\b", sentence)
        return Subject(name, verb.group()) if verb else None
    opening = r"(?:In [^.]{1,90}, )?"
    match = re.match(
        rf"{opening}((?:The|An?) )?({re.escape(name)}(?:es|s)?){aside} (is|was|are|were)\b", sentence, re.I
    )
    if match is None:
        return None
    article, words, verb = match.groups()
    if article is None and (words.lower() in common or (name.lower() in common and len(words) > len(name))):
        words = words[0].lower() + words[1:]
    return Subject((article or "").lower() + words, verb)


def common_nouns(leads: list[dict]) -> set[str]:
    """The titles, in lower case and also as plurals, that stand in lower case within sentences more often than not."""
    text = "\n".join(lead["text"] for lead in leads)
    within = collections.Counter()
    for phrase in re.findall(r"(?<=[\w,;] )(?=([^\W\d_][\w'’-]*(?: [\w'’-]+){0,3}))", text):
        parts = phrase.split(" ")
        for size in range(1, len(parts) + 1):
            within[" ".join(parts[:size])] += 1
    common = set()
    for lead in leads:
        name = re.sub(r" \(.*\)$", "", lead["title"])
        for form in (name, name + "s", name + "es"):
            lower = form[0].lower() + form[1:]
            if lower != form and within[lower] > within[form]:
                common.add(form.lower())
    return common


def ask(lead: dict, common: set[str]) -> list[dict] | None:
    """The conversation about one lead, None where its first sentence cannot be an answer."""
    sentences = answer_sentences(lead["text"])
    if not sentences or len(sentences[0].split()) > ANSWER_WORDS or not PREDICATE.search(sentences[0]):
        return None
    two = len(sentences) > 1 and len(" ".join(sentences[:2]).split()) <= ANSWER_WORDS
    subject = find_subject(lead, sentences[0], common)
    forms = TITLE_FORMS if subject is None else DIRECT_FORMS + TITLE_FORMS
    forms = [form for form in forms if two or form.sentences == 1]
    draw = random.Random(lead["title"])
    form = draw.choices(forms, [form.weight for form in forms])[0]

    person = is_person(lead, common)
    question = form.question.format(
        title=lead["title"],
        subject=subject and subject.words,
        verb=subject and subject.verb,
        who="who" if person else "what",
        Who="Who" if person else "What",
    )
    messages = []
    if draw.random() < 0.2 and not question.startswith("Describe"):
        messages.append({"role": "system", "content": draw.choice(SYSTEM_MESSAGES[form.sentences])})
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": " ".join(sentences[: form.sentences])})
    rest = sentences[form.sentences :]
    if form.follow_ups and messages[0]["content"] != "Answer in two sentences." and draw.random() < 0.4:
        for sentence in rest[: draw.randint(1, 2)]:
            if len(sentence.split()) > ANSWER_WORDS:
                break
            messages.append({"role": "user", "content": draw.choice(FOLLOW_UPS)})
            messages.append({"role": "assistant", "content": sentence})
    return messages


# --- Dialogues -------------------------------------------------------------------------------------------------------

FEWEST_MESSAGES, MOST_MESSAGES = 4, 8
MOST_EXCERPTS = 3  # of one dialogue
MESSAGE_WORDS = 60
# Words that fewer dialogues use are misspelled or tell who writes; those that are mostly capitalised are often names.
USED_BY, CAPITALISED_USED_BY = 10, 40
# Ends an excerpt before the message that holds one of these: a link, an address, a number that could be a telephone's;
# anything but words and common punctuation.
UNFIT = re.compile(r"[^\w\s.,!?'\":;()&%$-]|\w[.]\w{2}|\d{4}|\d[-.)\s]+\d\d|_")
# Or one of these words: first names,
UNFIT_WORDS = """
    adam alfredo ben bill brandon chris claire david donald elon george jack jackson james jim joe john jones jordan
    kyle max michael miles percy peter sam scarlet smith taylor ted tom tony alex graham nick tim shaw keena jaezo
    homeslice wilk name names named
"""
# where somebody can be found,
UNFIT_WORDS += """
    address email facebook gps insta instagram number phone snap snapchat text texting twitter byu provo orem uvu dorm
    ward dating married wife husband girlfriend boyfriend gf bf wedding fiance fiancee roommate roommates
    roomate roomates dorms emailed emails texted username password netid helaman heleman tucanos creamery wife's hubby
    girlfriends girlfriend's
"""
# the experiment in which the dialogues were collected,
UNFIT_WORDS += """
    ai ais app bot chat chats chatted chatting chit challenge competition conversation conversations convo convos eve
    experiment leaderboard md mdcrew mrgh participant points prize prizes prompt prompts rate rating spam spamming
    survey winning typing refresh refreshed timer notification notifications
    bots chatbot chatroom chatter chatters chitchat chitchatter raffle scoreboard typer glitch glitched glitches
    glitching catfishing
"""
# what is rude or grim.
UNFIT_WORDS += """
    ass bitch boobs cancer crap damn dead death depressed depression die died drug drugs drunk dumb fat freaking gay
    hate hell idiot jerk kill killed killing kiss kissed kissing lame loser murder naked poop pregnant rape racist screw
    sex sexy shit shut stupid suck sucked sucks suicide trump ugly weed hated hates hating crappy sucky pee
    screwed disgusting
"""
SELF_CONTAINED = re.compile(
    r"(?:(?:Hi|Hello|Hey|So|Well|Ok|Okay)\W+)?(?:What|How|Do you|Have you|Are you|Where|Who|Why do|Which|Did you|If|"
    r"Would you)\b(?!.{0,8}\b(?:about|it|that|there|those|they)\b)(?:\s[^\s?]+){2,}[^?]*\?$"
)
GREETING = re.compile(r"(?:Hi|Hello|Hey|Heyo|Yo|Good (?:morning|evening|afternoon)|What's up|Sup)\b")
NOT = "dont didnt doesnt isnt cant wont wouldnt couldnt shouldnt havent hasnt wasnt werent arent"
IS = "thats whats hes shes theres wheres hows"
CONTRACTIONS = {
    **{word: word[:-1] + "'t" for word in NOT.split()},
    **{word: word[:-1] + "'s" for word in IS.split()},
    **{"im": "I'm", "ive": "I've", "i": "I", "i'm": "I'm", "i've": "I've", "i'd": "I'd", "i'll": "I'll"},
    **{"youre": "you're", "theyre": "they're", "youve": "you've", "u": "you", "ur": "your", "bc": "because"},
    **{"gonna": "going to", "wanna": "want to"},
}


def tidy(utterance: str) -> str:
    """The utterance with its apostrophes, its first letter a capital one, and a mark at its end."""
    text = re.sub(r"\s+", " ", utterance.replace("’", "'")).strip()
    text = re.sub(
        r"(?<![\w'])[A-Za-z]+(?:'[A-Za-z]+)?(?![\w'])",
        lambda word: CONTRACTIONS.get(word.group().lower(), word.group()),
        text,
    )
    text = re.sub(r"\b(?:ha){3,}h?\b", "haha", text, flags=re.I)
    text = re.sub(r"\s+([,.!?])", r"\1", text)
    text = re.sub(r"([!?])[!?1]+", r"\1", text)
    text = re.sub(r"[.]{3,}", "...", text)
    text = re.sub(r"(^|[.!?] )([a-z])", lambda start: start[1] + start[2].upper(), text)
    return text if not text or re.search(r"(?:[.!?][\"')]*|[:;=]-?[()DP])$", text) else text + "."


def speaker_turns(dialogue: dict) -> list[tuple[str, str]]:
    """(speaker, text) in turns that alternate: what one speaker wrote without a reply is one."""
    turns: list[tuple[str, str]] = []
    for utterance in (utterance for group in dialogue["messages"] for utterance in group):
        text = tidy(utterance["text"])
        if turns and turns[-1][0] == utterance["sender"]:
            turns[-1] = (turns[-1][0], f"{turns[-1][1]} {text}".strip())
        else:
            turns.append((utterance["sender"], text))
    if len(turns) > 1 and "prompt" in dialogue and not GREETING.match(turns[0][1]):
        # Who does not begin with a greeting answers the question that both were given to talk about.
        turns.insert(0, (turns[1][0], tidy(dialogue["prompt"])))
    return turns


def vocabulary(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))


def common_words(dialogues: list[list[tuple[str, str]]]) -> set[str]:
    texts = [" ".join(text for _, text in turns) for turns in dialogues]
    used_by = collections.Counter(word for text in texts for word in vocabulary(text))
    within = collections.Counter(re.findall(r"(?<=[a-z,] )[A-Za-z']+", " ".join(texts)))
    capital = {word for word in used_by if within[word.capitalize()] + within[word.upper()] > within[word]}
    common = {word for word, n in used_by.items() if n >= (CAPITALISED_USED_BY if word in capital else USED_BY)}
    return common - set(UNFIT_WORDS.split())


def excerpts(turns: list[tuple[str, str]], common: set[str]) -> list[list[dict]]:
    """Runs of fit turns that start with the dialogue or with a question that can be understood by itself."""
    if len({speaker for speaker, _ in turns}) != 2:
        return []
    fit = [
        0 < len(text.split()) <= MESSAGE_WORDS and not UNFIT.search(text) and vocabulary(text) <= common
        for _, text in turns
    ]
    found, start = [], 0
    roles = ["user", "assistant"] * MOST_MESSAGES
    while start < len(turns) and len(found) < MOST_EXCERPTS:
        end = start
        while end < min(len(turns), start + MOST_MESSAGES) and fit[end]:
            end += 1
        end -= (end - start) % 2
        texts = [text for _, text in turns[start:end]]
        opens = start == 0 or SELF_CONTAINED.match(turns[start][1])
        if opens and len(texts) >= FEWEST_MESSAGES and sum(len(text.split()) >= 5 for text in texts) >= len(texts) / 2:
            found.append([{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)])
            start = end
        else:
            start += 1
    return found


def read_dialogues(wheel: Path) -> list[tuple[str, list[dict]]]:
    """(id of the dialogue, messages) of each excerpt, no two alike."""
    with zipfile.ZipFile(wheel) as archive:
        dialogues = json.loads(archive.read(DIALOGUES))
    turns = {key: speaker_turns(dialogue) for key, dialogue in dialogues.items()}
    common = common_words(list(turns.values()))
    found = {json.dumps(messages): key for key, t in turns.items() for messages in excerpts(t, common)}
    return [(key, json.loads(messages)) for messages, key in found.items()]


# --- Both ------------------------------------------------------------------------------------------------------------


def digest(key: str) -> int:
    return int(hashlib.sha1(key.encode()).hexdigest(), 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--output_dir", type=Path, default=SAMPLE_DATA / "instructions")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    leads = {
        split: pq.read_table(SAMPLE_DATA / f"wikipedia_leads/{split}.parquet").to_pylist()
        for split in ("train", "test")
    }
    common = common_nouns(leads["train"] + leads["test"])
    dialogues = read_dialogues(arguments.wheel)
    for split in ("train", "test"):
        candidates = {
            "wikipedia_leads": [(lead["title"], ask(lead, common)) for lead in leads[split]],
            "chitchat": [(key, m) for key, m in dialogues if (digest(key) % 100 < TEST_PERCENT) == (split == "test")],
        }
        rows = []
        for source, found in candidates.items():
            found = sorted(((digest(key), m) for key, m in found if m is not None), key=lambda row: row[0])
            taken = found[: LEADS[split]] if source == "wikipedia_leads" else found
            rows += [(key, {"messages": messages, "source": source}) for key, messages in taken]
            print(f"{split}: {len(taken)} of {len(found)} from {source}")
        rows.sort(key=lambda row: row[0])  # by a hash, so that the sources are mixed
        table = pa.Table.from_pylist([row for _, row in rows], schema=SCHEMA)
        file = arguments.output_dir / f"{split}.parquet"
        pq.write_table(table, file, compression="zstd", compression_level=19)
        size = sum(len(message["content"].encode()) for _, row in rows for message in row["messages"])
        print(f"{split}: {len(rows)} conversations, {size} bytes of text, file of {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
