"""Names of a program's variables.

With a space before it, each is one token in the tokenizers of Qwen, SmolLM2 and Gemma, so that a
variable's name is found by a single key.
"""

from __future__ import annotations

_WORDS = """
apple art baby back bag ball band bank bar base bath bay beach bean bear beat bed bee beer
bell belt bench bike bird birth block blood board boat body bone book boot border bottle
bowl box boy brain branch brand bread brick bridge brother brush bus bush butter button cake
camera camp card carpet cart case castle cat cell chain chair chalk chart cheese chest
chicken child church circle city clay clock cloth cloud club coach coal coast coat code
coffee coin corn cotton court cow craft cream crew crop crowd crown cup curve dance day deck
deer desk dish dog door dot dream dress drink drum duck dust eagle ear earth east edge egg
engine evening eye face factory farm feather field film finger fire fish flag flame flat
floor flour flower foot forest fork fox frame friend frog front fruit fuel game garden gas
gate gift girl glass glove goat gold grain grape grass guitar hair hall hammer hand harbor
hat head heart heat hen hill hole home honey hook horse hotel hour house ice inch ink iron
island jacket jar job juice jungle key king kitchen knee knife lady lake lamb lamp land leaf
leather leg lemon letter library light lime line lion lip list lock log lunch machine mail
map mark market meal meat metal milk mill mine mirror money monkey month moon morning mother
motor mountain mouse mouth mud museum music nail name neck needle nest net night north nose
nut oak ocean office oil onion orange oven owl page paint palace pan paper park party path
pen pencil pepper phone photo piano pig pin pipe pizza plane plant plate pocket poem poet
pond pool port pot potato prince prison purse queen rabbit radio rail rain rat ring river
road robot rock roof room root rope rose sail salt sand school screw sea seat seed shadow
sheep shell ship shirt shoe shop shore silk silver sister skin sky sleep smoke snake snow
soap sock soil song soup south spear spider spoon spring square stage stamp star station
steam steel stem step stone store storm story stove straw stream street string sugar suit
summer sun sword table tail tank tape tax tea team tent tie tiger tin tire toast tomato
tongue tool tooth tower town toy track train tray tree truck tube uncle valley van village
violin voice wagon wall watch water wave wax west wheat wheel whip wind window wine wing
winter wire wolf wood wool world worm yard year zoo
"""
NAMES = tuple(_WORDS.split())
