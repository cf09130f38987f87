"""What tasks ask: sets of sentences, one of which is drawn each time a sample is used.

{label} is what is meant, {images} which images ("all images", "image_1, image_3"), {fps} a rate, {point} a points tag.
"""

import re

ARTICLE = re.compile(r"(the|an?)\s+", re.IGNORECASE)
BEFORE_NOUN = re.compile(r"\b(the|every|each|all|any|how many|number of) \{label\}", re.IGNORECASE)


def fill(sentence: str, label: str, **values) -> str:
    """A sentence about a label. Where the sentence has a determiner before it, the label's own article is left out."""
    if BEFORE_NOUN.search(sentence) and (article := ARTICLE.match(label)) and article.end() < len(label):
        label = label[article.end() :]
    return sentence.format(label=label, **values)


CAPTION = (
    "Describe this {medium}.",
    "Describe the {medium} in detail.",
    "What does the {medium} show?",
    "Give a thorough description of the {medium}.",
    "Write down everything you can make out in this {medium}.",
    "Tell me what there is to see in the {medium}.",
    "Please caption this {medium} in detail.",
    "I cannot see the {medium}. What is in it?",
    "Explain the content of the {medium} to someone who has not seen it.",
    "Go through the {medium} and describe all of it.",
    "Provide a detailed account of this {medium}.",
    "What is going on in this {medium}? Be specific.",
    "Put the {medium} into words, as completely as you can.",
    "Write a long caption.",
    "Describe what you see, detail by detail.",
    "Paint a picture in words of this {medium}.",
)
SHORT_CAPTION = (
    "Describe the {medium} briefly.",
    "Sum up the {medium} in a sentence or two.",
    "What is this {medium} about, in short?",
    "Write a short caption.",
    "Give me a quick description of the {medium}.",
    "In few words, what does the {medium} show?",
    "Caption this {medium} concisely.",
    "Short summary of the {medium}, please.",
    "Name the main thing that the {medium} shows.",
    "How would you describe this {medium} in one line?",
)
TRANSCRIPT = (
    "Talk me through this {medium}.",
    "Describe the {medium} as if you were speaking to a friend.",
    "Say aloud what you see in the {medium}.",
    "Give a spoken description of the {medium}.",
    "What would you say about this {medium} if you had a minute to talk?",
    "Narrate the {medium} in your own words.",
    "Transcribe a spoken description of this {medium}.",
    "Speak about everything that catches your eye in the {medium}.",
)
POINT = (
    "Point to the {label}.",
    "Point to {label}.",
    "Point at every {label}.",
    "Where is the {label}?",
    "Where are the {label}?",
    "Show me the {label}.",
    "Find {label} and point to it.",
    "Can you point out the {label}?",
    "Mark each {label} with a point.",
    "Please locate {label}.",
    "Point: {label}",
    "Give me the points of all {label}.",
    "I am looking for {label}. Where?",
    "Place a point on every {label} you can find.",
    "Locate all instances of {label} with points.",
    "Indicate {label}.",
    "Which spots show {label}?",
    "If there is any {label}, point to it.",
)
POINT_COUNT = (
    "Point to each {label} and count them.",
    "Count the {label} by pointing.",
    "How many {label} are there? Point to each one.",
    "Mark every {label} and tell me the total.",
    "Point at all {label}, then say how many there are.",
    "Find all {label}, point to them and give their number.",
    "Go over the {label} one by one with points and count.",
    "Show each {label} and the total number.",
    "Count {label}, showing where each one is.",
    "What is the number of {label}? Use points.",
    "Point and count: {label}",
    "Locate all {label} and report the count.",
)
COUNT = (
    "How many {label} are there?",
    "Count the {label}.",
    "What is the number of {label}?",
    "How many {label} do you see?",
    "Tell me how many {label} there are.",
    "Give the total count of {label}.",
    "Number of {label}?",
    "Please count every {label}.",
    "How many {label} can be seen?",
    "Count: {label}",
)
POINT_IMAGES = (
    "Point to the {label} in {images}.",
    "Where is the {label} in {images}?",
    "Find {label} in {images} and point to it.",
    "Mark every {label} in {images}.",
    "Show me the {label} in {images}.",
    "Locate all {label} in {images}.",
    "In {images}, point to {label}.",
    "Point out each {label} that {images} show.",
    "Looking at {images}, where do you find {label}?",
    "Go through {images} and point to every {label}.",
)
POINT_COUNT_IMAGES = (
    "Point to each {label} in {images} and count them.",
    "How many {label} are there in {images}? Point to each one.",
    "Count the {label} in {images} by pointing.",
    "In {images}, mark every {label} and give the total.",
    "Find all {label} in {images}, point to them and say how many they are.",
    "Go through {images}, point at every {label} and count.",
    "Report the number of {label} in {images}, with points.",
    "Locate and count {label} in {images}.",
)
COUNT_IMAGES = (
    "How many {label} are there in {images}?",
    "Count the {label} in {images}.",
    "What is the number of {label} in {images}?",
    "In {images}, how many {label} do you see?",
    "Give the total of {label} over {images}.",
    "Count every {label} that {images} show.",
)
TRACK = (
    "Track the {label}.",
    "Follow the {label} through the video.",
    "Where is the {label} over time?",
    "Give the tracks of all {label}.",
    "Track every {label} from frame to frame.",
    "Keep an eye on the {label} and report the positions.",
    "Point to the {label} in each frame.",
    "Show how the {label} moves through the video.",
    "Trace the path of each {label}.",
    "Please track: {label}",
)
TRACK_FPS = (
    "Track the {label} at {fps} fps.",
    "Follow the {label} through the video, {fps} points per second.",
    "Give the tracks of all {label} at {fps} frames per second.",
    "At {fps} fps, where is the {label}?",
    "Track every {label} with a rate of {fps} fps.",
    "Point to the {label} {fps} times a second.",
    "Report the positions of the {label} at {fps} fps.",
    "Trace each {label}, sampled at {fps} fps.",
)
TRACK_ENDS = (
    "When and where does each {label} first and last appear?",
    "Point to the {label} at the first and the last moment it can be seen.",
    "Give the start and end points of every {label}.",
    "Mark where each {label} enters and where it leaves.",
    "Ground the {label}: first and last appearance.",
    "Find the first and last position of each {label}.",
    "Where does the {label} start and where does it end up?",
    "For every {label}, point to its first and its final visible place.",
)
TRACK_POINT = (
    "Track the object at {point} at {fps} fps.",
    "Follow what {point} marks, at {fps} frames per second.",
    "Starting from {point}, where does it go? Use {fps} fps.",
    "Here is a point: {point}. Track it at {fps} fps.",
    "Given {point}, track this object from there on at {fps} fps.",
    "Keep following {point}, {fps} points per second.",
)
EXPLAIN = (
    "Explain your reasoning first, then give a short answer.",
    "Think it through in writing and end with a brief answer.",
    "Reason step by step before the final short answer.",
    "First say why, then answer in a few words.",
    "Give the explanation, followed by a short answer.",
    "Work it out in the open and finish with the answer.",
    "Justify the answer first and state it at the end.",
    "Show how you get there, then answer briefly.",
)
CHOOSE = (
    "Choose the right option.",
    "Pick the correct answer.",
    "Which of these is right?",
    "Select the best option.",
    "Only one of the options is correct: which?",
    "Answer with one of the options.",
    "Decide for one option.",
    "Select the correct choice from those given.",
    "Please choose one.",
    "Find the option that answers the question.",
)
# Before questions that count: without it, the way to answer "how many" would be ambiguous with point-and-count.
NO_POINTS = (
    "Do not point.",
    "Answer without pointing.",
    "No points, please.",
    "Give the answer in words, without points.",
    "Do not use points.",
    "Without pointing:",
    "Answer in plain text.",
    "Points are not needed.",
)
