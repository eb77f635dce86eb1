"""The sentences of ``acceptability.py``, with slots for the words of its lexicon."""

TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    # Subject and verb, past a noun of the other number.
    "agreement": {
        "train": (
            "The <{person}|{person.pl}> in the {place} [is|are] {mood}.",
            "The <{thing} near the {thing2.pl}|{thing.pl} near the {thing2}> [was|were] {quality}.",
            "The <{person} who {vperson.past} the {person2.pl}|{person.pl} who {vperson.past} the"
            " {person2}> [has|have] {vnone.part} in the {place}.",
            "The {person} <and|beside> the {person2} [were|was] {mood} after the {event}.",
            "The {mood} <{person}|{person.pl}> [{vperson.s}|{vperson}] the {person2} from the"
            " {place}.",
            "There [is|are] <a {quality} {thing}|two {quality} {thing.pl}> in the {place}.",
        ),
        "dev": (
            "The <{person} with the {thing.pl}|{person.pl} with the {thing}> [seems|seem] {mood}.",
            "The <{thing} that the {person.pl}|{thing.pl} that the {person}> {vthing.past}"
            " [looks|look] {quality}.",
            "[Does|Do] the <{person}|{person.pl}> from the {place} {vperson} the {person2}?",
        ),
    },
    # A reflexive and the noun that it must go back to, which is in its own clause.
    "reflexive": {
        "train": (
            "The <{female}|{male}> {vself.past} [herself|himself] after the {event}.",
            "<{fname}|{mname}> {vsay.past} that <{mname}|{fname}> had {vself.part}"
            " [himself|herself].",
            "The <{male}|{male.pl}> in the {place} {vself.past} [himself|themselves].",
            "The <{female}|{female.pl}> {vself.past} [herself|each other] during the {event}.",
        ),
        "dev": (
            "<{fname}|{mname}> had never {vself.part} [herself|himself] before the {event}.",
            "The <{female} who {vperson.past} the {male}|{male} who {vperson.past} the {female}>"
            " {vself.past} [herself|himself].",
            "The <{person.pl} near the {female}|{female} near the {person.pl}> will {vself}"
            " [themselves|herself].",
        ),
    },
    # A determiner and the number of its noun, or whether it can be counted.
    "determiner": {
        "train": (
            "The {person} {vthing.past} [this|these] {quality} <{thing}|{thing.pl}>.",
            "[That|Those] <{thing}|{thing.pl}> in the {place} might be {quality}.",
            "{name} will {vthing} [a|several] {quality} <{thing}|{thing.pl}> before the {event}.",
            "The {person.pl} did not need [much|many] <{mass}|{thing.pl}> for the {event}.",
        ),
        "dev": (
            "[Every|All] <{thing}|{thing.pl}> in the {place} could be {quality}.",
            "[Another|Many] {mood} <{person}|{person.pl}> came to the {event}.",
            "Did {name} {vthing} [this|these] {quality} and {quality2} <{thing}|{thing.pl}>?",
            "How [much|many] <{mass}|{thing.pl}> did the {person} {vthing} after the {event}?",
        ),
    },
    # The form of a verb after its auxiliary.
    "auxiliary": {
        "train": (
            "The {person} <has|will> [{vstrong.part}|{vstrong}] the {thing} in the {place}.",
            "{name} <is|must> [{vthing.ing}|{vthing}] the {thing} in the {place}.",
            "The {person.pl} from the {place} <have|are> [{vthing.part}|{vthing.ing}] the"
            " {quality} {thing.pl}.",
        ),
        "dev": (
            "The {mood} {person} <should have|should> [{vstrong.part}|{vstrong}] the {thing}.",
            "Why <was|did> the {person} [{vthing.ing}|{vthing}] the {thing} during the {event}?",
            "{name} and the {person} <had|can> [{vstrong.part}|{vstrong}] the {thing.pl}.",
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
    # Words like any and ever, and the negation that must have them in its scope.
    "polarity": {
        "train": (
            "[No {person} that the|The {person} that no] {person2} {vperson.past} has ever"
            " {vnone.part}.",
            "[Nobody who the {person}|The {person} who nobody] {vperson.past} {vthing.past}"
            " anything.",
            "The {person.pl} who had [{vnone.part} had not {vthing.part}"
            "|not {vnone.part} had {vthing.part}] any {thing.pl}.",
        ),
        "dev": (
            "[The {person} did not {vthing} any|Any {person} did not {vthing} the] {thing.pl} at"
            " the {event}.",
            "[None of the {person.pl} beside the|The {person.pl} beside none of the] {person2.pl}"
            " have ever {vnone.part}.",
            "[Hardly any {person.pl}|Any {person.pl} hardly] {vnone.past} during the {event}.",
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
    # The auxiliary stands first in a question, but not in one inside a sentence.
    "inversion": {
        "train": (
            "<Where|{name} knows where> [is the {person}|the {person} is] {vthing.ing} the"
            " {thing}<?|.>",
            "<When|Nobody remembers when> [will {name}|{name} will] {vthing} the {thing}<?|.>",
            "<Which {thing}|The {person} remembers which {thing}> [has {name}|{name} has]"
            " {vthing.part}<?|.>",
        ),
        "dev": (
            "<Why|No one understands why> [is the {person}|the {person} is] so {mood}<?|.>",
            "<How|It is clear how> [can {name}|{name} can] {vthing} the {quality} {thing}<?|.>",
        ),
    },
    # Be with an adjective, do with a verb.
    "do-support": {
        "train": (
            "The {person} in the {place} [is|does] not <{mood}|{vperson} {name}>.",
            "[Are|Do] the {person.pl} <{mood} after the {event}|{vperson} the {person2}>?",
            "If the {person.pl} [are|do] not <{mood}|{vperson} {name}>, nobody will {vnone}.",
        ),
        "dev": (
            "[Wasn't|Didn't] the {person} <{mood}|{vnone}> during the {event}?",
            "{name} {vsay.past} that the {person.pl} [were|did] not <{mood}|{vthing} the {thing}>.",
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
        ),
        "dev": (
            "Did <|the {person} {vperson} >[{pronoun}|{pronoun.obj}]"
            "< {vperson} the {person}|> at the {event}?",
            "The {thing} <that |near >[{pronoun}|{pronoun.obj}]< {vthing.past}|> is {quality}.",
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
    # The tense of a verb, and the time that is said.
    "tense": {
        "train": (
            "The {person} [{vthing.past}|will {vthing}] the {thing} <yesterday|tomorrow>.",
            "<Last|Next> week, {name} [{vperson.past}|will {vperson}] the {person} in the {place}.",
            "<Yesterday|Tomorrow> the {mood} {person} [{vnone.past}|will {vnone}] in the {place}.",
        ),
        "dev": (
            "The {event} [was|will be] in the {place} <a month ago|a month from now>.",
            "[Did|Will] {name} {vthing} the {thing} <last|next> Monday?",
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
    # Who for people, which for things.
    "relative": {
        "train": (
            "{name} noticed the <{person}|{thing}> [who|which] was in the {place}.",
            "The <{person}|{thing}> [who|which] {name} noticed is in the {place}.",
            "Where is the <{person}|{thing}> [who|which] arrived after the {event}?",
        ),
        "dev": (
            "There was a <{person}|{thing}> at the {event} [who|which] nobody liked.",
            "The <{person}|{thing}>, [who|which] was near the {place}, disappeared.",
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
    # The order of words in a phrase.
    "order": {
        "train": (
            "The [{mood} {person}|{person} {mood}] {vperson.past} the {person2} in the {place}.",
            "{name} had never {vthing.part} [such a|a such] {quality} {thing}.",
            "[All the|The all] {person.pl} in the {place} were {mood}.",
        ),
        "dev": (
            "[Both the|The both] {person.pl} {vperson.past} the {person2}.",
            "{name} is [{mood} enough|enough {mood}] to {vthing} the {thing}.",
            "The {thing} in the {place} is [very {quality}|{quality} very].",
        ),
    },
}
"""Phenomenon by phenomenon, the templates of train and those of dev.

``{person}`` is a word of the pool ``person``, the same wherever it stands in the template,
``{person2}`` is another, and ``{person.pl}`` its plural. ``<a|b>`` are two contexts, ``[x|y]``
two forms. A sentence is acceptable if all its choices fall on the same side: a with x, b with y.
So a template gives four sentences, or, if it has no contexts, two: acceptable with x, not with y.

Every template gives as many acceptable as unacceptable sentences, made of the same words, equally
often. What tells them apart is only how the words go together.
"""
