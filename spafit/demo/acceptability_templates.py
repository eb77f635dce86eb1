"""The sentences of ``acceptability.py``, with slots for the words of its lexicon."""

TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    # Subject and verb, past a noun of the other number.
    "agreement": {
        "train": (
            "The <{person}|{person.pl}> in the {place} [is|are] {mood}.",
            "The <{thing} near the {thing2.pl}|{thing.pl} near the {thing2}> [was|were] {quality}.",
            "The <{person}|{person.pl}> who {vperson.past} the {person2} [has|have] {vnone.part}.",
            "[Is|Are] the {mood} <{person}|{person.pl}> in the {place}?",
            "After the {event}, the <{thing}|{thing.pl}> [was|were] very {quality}.",
            "There [is|are] <a {quality} {thing}|two {quality} {thing.pl}> in the {place}.",
            "{name} {vsay.past} that the <{person}|{person.pl}> [was|were] {mood}.",
            "The {person} <and|beside> the {person2} [were|was] {mood} after the {event}.",
        ),
        "dev": (
            "The <{thing}|{thing.pl}> that {name} {vthing.past} [is|are] {quality}.",
            "[Was|Were] the <{person} with the {thing.pl}|{person.pl} with the {thing}> {mood}?",
            "Since the {event}, the <{person}|{person.pl}> beside {name} [has|have] {vnone.part}.",
        ),
    },
    # A reflexive and the noun that it must go back to, which is in its own clause.
    "reflexive": {
        "train": (
            "The <{female}|{male}> {vself.past} [herself|himself] after the {event}.",
            "<{fname}|{mname}> {vsay.past} that <{mname}|{fname}> had {vself.part}"
            " [himself|herself].",
            "The <{male}|{male.pl}> in the {place} {vself.past} [himself|themselves].",
            "The <{female}|{female.pl}> will {vself} [herself|themselves] during the {event}.",
            "Did <{fname}|{mname}> {vself} [herself|himself] in the {place}?",
            "During the {event}, <the {male}|{fname}> {vself.past} [himself|herself] again.",
        ),
        "dev": (
            "<{fname}|{mname}> had never {vself.part} [herself|himself] before the {event}.",
            "The <{female} who {vperson.past} the {male}|{male} who {vperson.past} the {female}>"
            " {vself.past} [herself|himself].",
            "Because of the {event}, the <{male}|{male.pl}> must {vself} [himself|themselves].",
        ),
    },
    # A determiner and the number of its noun.
    "determiner": {
        "train": (
            "The {person} {vthing.past} [this|these] {quality} <{thing}|{thing.pl}>.",
            "[That|Those] <{thing}|{thing.pl}> in the {place} might be {quality}.",
            "{name} will {vthing} [a|several] {quality} <{thing}|{thing.pl}> before the {event}.",
            "[Every|All] <{person}|{person.pl}> in the {place} could be {mood}.",
            "Did the {person} {vthing} [that|those] <{thing}|{thing.pl}>?",
            "During the {event}, [this|these] <{person}|{person.pl}> {vnone.past}.",
        ),
        "dev": (
            "Did {name} {vthing} [this|these] {quality} and {quality2} <{thing}|{thing.pl}>?",
            "The {mood} {person} pointed at [that|those] <{thing}|{thing.pl}> in the {place}.",
            "After the {event}, [every|all] <{person}|{person.pl}> had to {vnone}.",
            "[A|Several] <{person}|{person.pl}> from the {place} will {vnone}.",
        ),
    },
    # The form of a verb after its auxiliary.
    "auxiliary": {
        "train": (
            "The {person} <has|will> [{vstrong.part}|{vstrong}] the {thing} in the {place}.",
            "{name} <is|must> [{vthing.ing}|{vthing}] the {thing} in the {place}.",
            "The {person.pl} <have|are> [{vthing.part}|{vthing.ing}] the {quality} {thing.pl}.",
            "During the {event}, the {person} <was|did not> [{vnone.ing}|{vnone}].",
            "<Has|Can> {name} [{vthing.part}|{vthing}] the {thing}?",
            "The {thing} that {name} <had|could> [{vstrong.part}|{vstrong}] was {quality}.",
        ),
        "dev": (
            "The {mood} {person} from the {place} <was|will> [{vthing.ing}|{vthing}] the {thing}.",
            "Why <has|did> the {person} [{vstrong.part}|{vstrong}] the {thing}?",
            "{name} and the {person} <have|must> [{vnone.part}|{vnone}] at the {event}.",
        ),
    },
    # The form of a pronoun: subject, or object of a verb or preposition.
    "case": {
        "train": (
            "<|The {person} {vperson.past} >[{pronoun}|{pronoun.obj}]"
            "< {vperson.past} the {person}|> in the {place}.",
            "{name} {vsay.past} that <|the {person} had {vperson.part} >[{pronoun}|{pronoun.obj}]"
            "< had {vperson.part} the {person}|>.",
            "After the {event}, <|{name} {vthing.past} the {thing} for >[{pronoun}|{pronoun.obj}]"
            "< {vthing.past} the {thing} for {name}|>.",
            "The {thing} <that |near >[{pronoun}|{pronoun.obj}]< {vthing.past}|> was {quality}.",
            "Can <|the {person} {vthing} the {thing} for >[{pronoun}|{pronoun.obj}]"
            "< {vthing} the {thing} for the {person}|>?",
        ),
        "dev": (
            "Did <|the {person} {vperson} >[{pronoun}|{pronoun.obj}]"
            "< {vperson} the {person}|> at the {event}?",
            "The {person} <whom |beside >[{pronoun}|{pronoun.obj}]< {vperson.past}|> was {mood}.",
            "<When |After the {event}, {name} came with >[{pronoun}|{pronoun.obj}]"
            "< {vnone.past}, {name} was {mood}|>.",
        ),
    },
    # The auxiliary stands first in a question, but not in one inside a sentence.
    "inversion": {
        "train": (
            "<Where|{name} knows where> [is the {person}|the {person} is] {vthing.ing} the"
            " {thing}<?|.>",
            "<When|Nobody remembers when> [will {name}|{name} will] {vthing} the {thing}<?|.>",
            "<Which {thing}|The {person} remembers which {thing}> [has {name}|{name} has]"
            " {vthing.part}<?|.>",
            "<Why|{name} explained why> [was the {person}|the {person} was] {mood}<?|.>",
            "<How|The {person.pl} know how> [should {name}|{name} should] {vthing} the"
            " {thing}<?|.>",
            "<Where|Nobody said where> [are the {person.pl}|the {person.pl} are] {vnone.ing}<?|.>",
        ),
        "dev": (
            "<Why|No one understands why> [is the {person}|the {person} is] so {mood}<?|.>",
            "<How|It is clear how> [can {name}|{name} can] {vthing} the {quality} {thing}<?|.>",
            "<When|The {person} forgot when> [was the {event}|the {event} was]<?|.>",
        ),
    },
    # Be with an adjective, do with a verb.
    "do-support": {
        "train": (
            "The {person} in the {place} [is|does] not <{mood}|{vperson} {name}>.",
            "[Are|Do] the {person.pl} <{mood} after the {event}|{vperson} the {person2}>?",
            "If the {person.pl} [are|do] not <{mood}|{vperson} {name}>, nobody will {vnone}.",
            "{name} [was|did] not <{mood}|{vnone}> during the {event}.",
            "Why [was|did] {name} <so {mood}|{vthing} the {thing}>?",
        ),
        "dev": (
            "[Was|Did] the {person} <{mood}|{vnone}> before the {event}?",
            "{name} {vsay.past} that the {person.pl} [were|did] not <{mood}|{vthing} the {thing}>.",
            "The {thing} in the {place} [is|does] not <{quality}|belong to {name}>.",
        ),
    },
    # Words like any and ever, and the negation that must have them in its scope.
    "polarity": {
        "train": (
            "[No {person} that the|The {person} that no] {person2} {vperson.past} has ever"
            " {vnone.part}.",
            "[Nobody who the {person}|The {person} who nobody] {vperson.past} {vthing.past}"
            " anything.",
            "The {person.pl} who had [{vnone.part} had not {vthing.part}"
            "|not {vnone.part} had {vthing.part}] any {thing.pl}.",
            "[The {person} did not {vthing} any|Any {person} did not {vthing} the] {thing.pl} in"
            " the {place}.",
        ),
        "dev": (
            "[None of the {person.pl} beside the|The {person.pl} beside none of the] {person2.pl}"
            " have ever {vnone.part}.",
            "[No {thing} that the {person}|The {thing} that no {person}] {vthing.past} was ever"
            " {quality}.",
            "At the {event}, [the {person} did not {vperson} any|any {person} did not {vperson}"
            " the] {person2.pl}.",
        ),
    },
    # The tense of a verb, and the time that is said.
    "tense": {
        "train": (
            "The {person} [{vthing.past}|will {vthing}] the {thing} <yesterday|tomorrow>.",
            "<Last|Next> week, {name} [{vperson.past}|will {vperson}] the {person} in the {place}.",
            "<Yesterday|Tomorrow> the {mood} {person} [{vnone.past}|will {vnone}] in the {place}.",
            "The {person.pl} [were|will be] {mood} <last|next> week.",
            "[Did|Will] {name} {vthing} the {thing} <yesterday|tomorrow>?",
        ),
        "dev": (
            "The {event} [was|will be] in the {place} <yesterday|tomorrow>.",
            "[Did|Will] the {mood} {person} {vnone} <last|next> Monday?",
            "{name} and the {person} [{vthing.past}|will {vthing}] the {thing} <last|next> Monday.",
        ),
    },
    # Who for people, which for things.
    "relative": {
        "train": (
            "{name} noticed the <{person}|{thing}> [who|which] was in the {place}.",
            "The <{person}|{thing}> [who|which] {name} noticed is in the {place}.",
            "Where is the <{person}|{thing}> [who|which] arrived after the {event}?",
            "There is a <{person}|{thing}> in the {place} [who|which] {name} wants.",
            "The <{person}|{thing}>, [who|which] was in the {place}, vanished.",
        ),
        "dev": (
            "There was a <{person}|{thing}> at the {event} [who|which] nobody liked.",
            "{name} liked the <{person}|{thing}> [who|which] came from the {place}.",
            "The <{person}|{thing}> [who|which] disappeared came from the {place}.",
        ),
    },
    # The order of words in a phrase.
    "order": {
        "train": (
            "The [{mood} {person}|{person} {mood}] {vperson.past} the {person2} in the {place}.",
            "{name} had never {vthing.part} [such a|a such] {quality} {thing}.",
            "[All the|The all] {person.pl} in the {place} were {mood}.",
            "The {person} is [very {mood}|{mood} very] after the {event}.",
            "{name} was [{mood} enough|enough {mood}] to {vthing} the {thing}.",
            "Will the [{quality} {thing}|{thing} {quality}] be in the {place}?",
        ),
        "dev": (
            "Did the {person} {vthing} [all the|the all] {quality} {thing.pl}?",
            "The {thing} in the {place} seems [very {quality}|{quality} very].",
            "The {person.pl} were not [{mood} enough|enough {mood}] to {vperson} {name}.",
            "The [{mood} {person}|{person} {mood}] will {vnone} before the {event}.",
        ),
    },
    # Verbs that need an object, and verbs that bear none.
    "transitivity": {
        "train": (
            "The {person} <{vthing.past}|{vnone.past}>[ the {thing}|] in the {place}.",
            "After the {event}, the {person.pl} <{vthing.past}|{vnone.past}>[ the {quality}"
            " {thing}|].",
            "{name} will <{vthing}|{vnone}>[ the {thing}|] because the {person} is {mood}.",
        ),
        "dev": (
            "Did the {mood} {person} <{vthing}|{vnone}>[ the {thing}|] during the {event}?",
            "The {person} who <{vthing.past}|{vnone.past}>[ the {thing}|] was {mood}.",
        ),
    },
    # The form of a clause that a verb takes: finding, to find, someone to find.
    "complement": {
        "train": (
            "The {person} <{vgerund.past}|{vinf.past}> [{vthing.ing}|to {vthing}] the {thing}.",
            "{name} might <{vgerund}|{vinf}> [{vthing.ing}|to {vthing}] the {thing} in the"
            " {place}.",
            "The {person} <{vpersuade.past}|{vinf.past}>[ {name}|] to {vthing} the {thing}.",
        ),
        "dev": (
            "Has the {person} <{vgerund.part}|{vinf.part}> [{vthing.ing}|to {vthing}] the"
            " {quality} {thing}?",
            "{name} may <{vpersuade}|{vinf}>[ the {person}|] to {vthing} the {thing} after the"
            " {event}.",
        ),
    },
    # A question word or relative pronoun, and the gap that it must fill.
    "gap": {
        "train": (
            "The {person} {vknow.past} <what|that> {name} {vthing.past}[| the {thing}].",
            "<What did|Did> the {person} {vthing}[| the {thing}] in the {place}?",
            "{name} {vthing.past} the {thing} <that|because> the {person} {vthing2.past}[| the"
            " {thing2}].",
        ),
        "dev": (
            "The {person} {vknow.past} <which {thing}|whether> {name} had {vthing.part}[| the"
            " {thing2}].",
            "<Who did|Did> the {person} {vperson}[| the {person2}] at the {event}?",
            "<Which {thing} should|Should> the {person} {vthing}[| the {thing2}] before the"
            " {event}?",
        ),
    },
    # "much older", "more expensive".
    "comparison": {
        "train": (
            "The {thing} is [much|more] <{er}|{long}> than the {thing2}.",
            "The {person} wants a [much|more] <{er}|{long}> {thing} for the {event}.",
            "Is the {thing} in the {place} [much|more] <{er}|{long}> than this one?",
        ),
        "dev": (
            "The {thing} that {name} {vthing.past} seems [much|more] <{er}|{long}> than the"
            " {thing2}.",
            "{name} will {vthing} a [much|more] <{er}|{long}> {thing} tomorrow.",
        ),
    },
    # By whom in the passive, whom in the active.
    "passive": {
        "train": (
            "The {person} <was|has> {vperson.part} [by the|the] {person2} in the {place}.",
            "The {person.pl} <will be|will have> {vperson.part} [by {name}|{name}] before the"
            " {event}.",
            "{name} {vsay.past} that the {person} <was|had> {vperson.part} [by the|the] {person2}.",
        ),
        "dev": (
            "<Was|Has> the {person} {vperson.part} [by the|the] {person2} at the {event}?",
            "The {person} who <was|had> {vperson.part} [by {name}|{name}] is {mood}.",
            "{name} should <be|have> {vperson.part} [by the|the] {person} from the {place}.",
        ),
    },
    # "pick it up", "glance at it".
    "particle": {
        "train": (
            "The {person} <{vpart.past}|{vprep.past}> [it"
            " <{vpart.tail}|{vprep.tail}>|<{vpart.tail}|{vprep.tail}> it] in the {place}.",
            "Although the {thing} was {quality}, {name} did not <{vpart}|{vprep}> [it"
            " <{vpart.tail}|{vprep.tail}>|<{vpart.tail}|{vprep.tail}> it].",
            "If {name} {vthing.s} the {thing}, the {person} may <{vpart}|{vprep}> [it"
            " <{vpart.tail}|{vprep.tail}>|<{vpart.tail}|{vprep.tail}> it].",
        ),
        "dev": (
            "Will the {person} <{vpart}|{vprep}> [them"
            " <{vpart.tail}|{vprep.tail}>|<{vpart.tail}|{vprep.tail}> them] after the {event}?",
            "{name} {vthing.past} the {thing} and <{vpart.past}|{vprep.past}> [it"
            " <{vpart.tail}|{vprep.tail}>|<{vpart.tail}|{vprep.tail}> it].",
        ),
    },
}
"""Phenomenon by phenomenon, the templates of train and those of dev.

``{person}`` is a word of the pool ``person``, the same wherever it stands in the template,
``{person2}`` is another, and ``{person.pl}`` its plural. ``<a|b>`` are two contexts, ``[x|y]``
two forms. A sentence is acceptable if all its choices fall on the same side: a with x, b with y.
So a template gives four sentences, or, if it has no contexts, two: acceptable with x, not with y.

Every template gives as many acceptable as unacceptable sentences, and each context and each form
is as often in the one as in the other. What tells them apart is only how they go together.
"""
