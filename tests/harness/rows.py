"""Small data sets of our own in the columns of public Italian ones, for check.py. Not for measuring models."""
import itertools
import json
import pathlib

CAPITALS = [
    ("Francia", "Parigi"), ("Spagna", "Madrid"), ("Germania", "Berlino"), ("Grecia", "Atene"), ("Portogallo", "Lisbona"),
    ("Austria", "Vienna"), ("Svezia", "Stoccolma"), ("Polonia", "Varsavia"), ("Irlanda", "Dublino"), ("Norvegia", "Oslo"),
    ("Egitto", "Il Cairo"), ("Giappone", "Tokyo"),
]
SCENES = [
    ("Ha piovuto tutta la notte.", "La strada era bagnata.", "Il sole bruciava i campi."),
    ("Il bambino ha lasciato cadere il bicchiere.", "Il bicchiere si è rotto.", "Il latte è tornato in frigorifero."),
    ("La nonna ha acceso il forno.", "In cucina faceva caldo.", "La neve copriva il tavolo."),
    ("Marco ha perso le chiavi di casa.", "È rimasto fuori dalla porta.", "Ha comprato un gelato al limone."),
    ("Il gatto ha visto un topo.", "Gli è corso dietro.", "Ha letto il giornale."),
    ("Lucia ha studiato molto per l'esame.", "È stata promossa.", "Ha dimenticato il suo nome."),
    ("Il treno è partito in ritardo.", "Siamo arrivati tardi.", "Abbiamo aspettato l'autunno."),
    ("Abbiamo piantato dei semi nell'orto.", "Sono cresciuti i pomodori.", "La radio ha smesso di suonare."),
    ("Il cane abbaiava alla porta.", "Qualcuno stava arrivando.", "Il mare era calmo."),
    ("Ho messo troppo sale nella minestra.", "Nessuno l'ha mangiata.", "La sedia è diventata verde."),
    ("Gianni ha corso per un'ora.", "Era molto stanco.", "La matita era spuntata."),
    ("È andata via la luce.", "Abbiamo acceso una candela.", "Abbiamo spento il mare."),
]
PAIRS = [
    ("I ragazzi giocano nel cortile.", "I ragazzi gioca nel cortile."), ("La casa è vecchia.", "La casa è vecchio."),
    ("Noi andiamo al mare.", "Noi va al mare."), ("Tu hai ragione.", "Tu ha ragione."), ("Le mele sono rosse.", "Le mele sono rossi."),
    ("Il libro che ho letto era bello.", "Il libro che ho letto era bella."), ("Loro dormono ancora.", "Loro dorme ancora."),
    ("Questa strada è lunga.", "Questo strada è lunga."), ("Mia sorella studia a Roma.", "Mia sorella studi a Roma."),
    ("Voi siete arrivati presto.", "Voi è arrivati presto."), ("Gli studenti leggono molto.", "Gli studenti legge molto."),
    ("La bambina si è addormentata.", "La bambina si è addormentato."),
]


def others(index, count):
    """The answers of `count` rows that follow."""
    return [CAPITALS[(index + 1 + i) % len(CAPITALS)][1] for i in range(count)]


def options(index, answer):
    """Four answers with the right one at a place that changes, and that place."""
    place = index % 4
    wrong = others(index, 3)
    return wrong[:place] + [answer] + wrong[place:], place


def tasks():
    """Name of a task: its rows."""
    rows = {name: [] for name in ("arc_it", "xcopa_it", "belebele_ita_Latn", "hellaswag_it", "multiblimp_ita", "lambada_openai_mt_it")}
    for i, (country, capital) in enumerate(CAPITALS):
        four, place = options(i, capital)
        letters = dict(zip(("option_a", "option_b", "option_c", "option_d"), four))
        rows["arc_it"].append(
            {"id": str(i), "instruction": f"Qual è la capitale di questo paese: {country}?", **letters, "option_e": None, "answer": "ABCD"[place]}
        )
        passage = f"Siamo arrivati in {country} di sera. Il giorno dopo abbiamo visitato {capital}, la capitale, e poi la campagna."
        answers = {f"mc_answer{n + 1}": text for n, text in enumerate(four)}
        question = "Quale città hanno visitato?"
        rows["belebele_ita_Latn"].append(
            {"flores_passage": passage, "question": question, **answers, "correct_answer_num": str(place + 1), "dialect": "ita_Latn"}
        )
    for i, (premise, effect, nonsense) in enumerate(SCENES):
        first, second = (effect, nonsense) if i % 2 == 0 else (nonsense, effect)
        row = {"premise": premise, "choice1": first, "choice2": second, "question": "effect", "label": i % 2, "idx": i, "changed": False}
        rows["xcopa_it"].append(row)
        far = [scene[2] for scene in itertools.islice(itertools.cycle(SCENES), i + 1, i + 4)]
        place = i % 4
        endings = far[:place] + [effect] + far[place:]
        rows["hellaswag_it"].append(
            {"ind": i, "activity_label": "Vita di ogni giorno", "ctx_a": premise, "ctx_b": "poi", "ctx": premise, "endings": endings, "label": str(place)}
        )
        rows["lambada_openai_mt_it"].append({"text": f"{premise} {effect}".rstrip(".")})
    rows["multiblimp_ita"] = [{"sen": good, "wrong_sen": bad} for good, bad in PAIRS]
    return rows


def write(folder: pathlib.Path):
    """Writes NAME.jsonl for every task; returns the names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in tasks().items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return list(tasks())
