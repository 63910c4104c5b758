"""Categories of the public data sets: facts that their files do not tell.

One entry per category: its id in the data set's files, its name, and ``*`` if it is stuff.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass


@dataclass(frozen=True)
class Category:
    """A category: id in the files of the data set, name, and whether it is a thing."""

    id: int
    name: str
    isthing: bool


def parse_categories(text: str) -> list[Category]:
    """Reads ``id name; id name *; …``, where ``*`` marks stuff."""
    categories = []
    for entry in text.split(";"):
        number, name = " ".join(entry.split()).split(" ", 1)
        categories.append(Category(int(number), name.removesuffix(" *"), not name.endswith(" *")))
    return categories


def class_colours(count: int, offset: float = 0.0) -> list[list[int]]:
    """Colours (RGB, 0 to 255) that differ most between neighbours in the list."""
    colours = []
    for number in range(count):
        # Steps of the golden ratio spread any number of hues evenly.
        hue = (offset + number * 0.6180339887) % 1.0
        saturation, value = (0.75, 0.55, 0.9)[number % 3], (0.95, 0.85, 0.7)[number // 3 % 3]
        colours.append([round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value)])
    return colours


#: The 133 categories of COCO panoptic; the 80 things are also those of COCO instances.
COCO_PANOPTIC = parse_categories(
    """
    1 person; 2 bicycle; 3 car; 4 motorcycle; 5 airplane; 6 bus; 7 train; 8 truck; 9 boat;
    10 traffic light; 11 fire hydrant; 13 stop sign; 14 parking meter; 15 bench; 16 bird;
    17 cat; 18 dog; 19 horse; 20 sheep; 21 cow; 22 elephant; 23 bear; 24 zebra; 25 giraffe;
    27 backpack; 28 umbrella; 31 handbag; 32 tie; 33 suitcase; 34 frisbee; 35 skis;
    36 snowboard; 37 sports ball; 38 kite; 39 baseball bat; 40 baseball glove;
    41 skateboard; 42 surfboard; 43 tennis racket; 44 bottle; 46 wine glass; 47 cup;
    48 fork; 49 knife; 50 spoon; 51 bowl; 52 banana; 53 apple; 54 sandwich; 55 orange;
    56 broccoli; 57 carrot; 58 hot dog; 59 pizza; 60 donut; 61 cake; 62 chair; 63 couch;
    64 potted plant; 65 bed; 67 dining table; 70 toilet; 72 tv; 73 laptop; 74 mouse;
    75 remote; 76 keyboard; 77 cell phone; 78 microwave; 79 oven; 80 toaster; 81 sink;
    82 refrigerator; 84 book; 85 clock; 86 vase; 87 scissors; 88 teddy bear; 89 hair drier;
    90 toothbrush; 92 banner *; 93 blanket *; 95 bridge *; 100 cardboard *; 107 counter *;
    109 curtain *; 112 door-stuff *; 118 floor-wood *; 119 flower *; 122 fruit *;
    125 gravel *; 128 house *; 130 light *; 133 mirror-stuff *; 138 net *; 141 pillow *;
    144 platform *; 145 playingfield *; 147 railroad *; 148 river *; 149 road *; 151 roof *;
    154 sand *; 155 sea *; 156 shelf *; 159 snow *; 161 stairs *; 166 tent *; 168 towel *;
    171 wall-brick *; 175 wall-stone *; 176 wall-tile *; 177 wall-wood *; 178 water-other *;
    180 window-blind *; 181 window-other *; 184 tree-merged *; 185 fence-merged *;
    186 ceiling-merged *; 187 sky-other-merged *; 188 cabinet-merged *; 189 table-merged *;
    190 floor-other-merged *; 191 pavement-merged *; 192 mountain-merged *;
    193 grass-merged *; 194 dirt-merged *; 195 paper-merged *; 196 food-other-merged *;
    197 building-other-merged *; 198 rock-merged *; 199 wall-other-merged *;
    200 rug-merged *
    """
)

#: The 150 classes of the ADE20K challenge, in the order of their labels.
ADE20K = parse_categories(
    """
    0 wall *; 1 building *; 2 sky *; 3 floor *; 4 tree *; 5 ceiling *; 6 road, route *;
    7 bed; 8 window; 9 grass *; 10 cabinet; 11 sidewalk, pavement *; 12 person;
    13 earth, ground *; 14 door; 15 table; 16 mountain, mount *; 17 plant *; 18 curtain;
    19 chair; 20 car; 21 water *; 22 painting, picture; 23 sofa; 24 shelf; 25 house *;
    26 sea *; 27 mirror; 28 rug *; 29 field *; 30 armchair; 31 seat; 32 fence; 33 desk;
    34 rock, stone *; 35 wardrobe, closet, press; 36 lamp; 37 tub; 38 rail; 39 cushion;
    40 base, pedestal, stand *; 41 box; 42 column, pillar; 43 signboard, sign;
    44 chest of drawers, chest, bureau, dresser; 45 counter; 46 sand *; 47 sink;
    48 skyscraper *; 49 fireplace; 50 refrigerator, icebox; 51 grandstand, covered stand *;
    52 path *; 53 stairs; 54 runway *; 55 case, display case, showcase, vitrine;
    56 pool table, billiard table, snooker table; 57 pillow; 58 screen door, screen;
    59 stairway, staircase *; 60 river *; 61 bridge, span *; 62 bookcase;
    63 blind, screen *; 64 coffee table;
    65 toilet, can, commode, crapper, pot, potty, stool, throne; 66 flower; 67 book;
    68 hill *; 69 bench; 70 countertop; 71 stove; 72 palm, palm tree; 73 kitchen island;
    74 computer; 75 swivel chair; 76 boat; 77 bar *; 78 arcade machine;
    79 hovel, hut, hutch, shack, shanty *; 80 bus; 81 towel; 82 light; 83 truck; 84 tower *;
    85 chandelier; 86 awning, sunshade, sunblind; 87 street lamp; 88 booth; 89 tv; 90 plane;
    91 dirt track *; 92 clothes; 93 pole; 94 land, ground, soil *;
    95 bannister, banister, balustrade, balusters, handrail;
    96 escalator, moving staircase, moving stairway *;
    97 ottoman, pouf, pouffe, puff, hassock; 98 bottle; 99 buffet, counter, sideboard *;
    100 poster, posting, placard, notice, bill, card *; 101 stage *; 102 van; 103 ship;
    104 fountain; 105 conveyer belt, conveyor belt, conveyer, conveyor, transporter *;
    106 canopy *; 107 washer, automatic washer, washing machine; 108 plaything, toy;
    109 pool *; 110 stool; 111 barrel, cask; 112 basket, handbasket; 113 falls *;
    114 tent *; 115 bag; 116 minibike, motorbike; 117 cradle *; 118 oven; 119 ball;
    120 food, solid food; 121 step, stair; 122 tank, storage tank *; 123 trade name;
    124 microwave; 125 pot; 126 animal; 127 bicycle; 128 lake *; 129 dishwasher; 130 screen;
    131 blanket, cover *; 132 sculpture; 133 hood, exhaust hood; 134 sconce; 135 vase;
    136 traffic light; 137 tray; 138 trash can; 139 fan; 140 pier *; 141 crt screen *;
    142 plate; 143 monitor; 144 bulletin board; 145 shower *; 146 radiator;
    147 glass, drinking glass; 148 clock; 149 flag
    """
)

#: The 19 classes that Cityscapes evaluates, in the order of their training ids.
CITYSCAPES = parse_categories(
    """
    7 road *; 8 sidewalk *; 11 building *; 12 wall *; 13 fence *; 17 pole *;
    19 traffic light *; 20 traffic sign *; 21 vegetation *; 22 terrain *; 23 sky *;
    24 person; 25 rider; 26 car; 27 truck; 28 bus; 31 train; 32 motorcycle; 33 bicycle
    """
)

#: The 59 classes of Pascal Context and the background, in the order of their labels.
PASCAL_CONTEXT = parse_categories(
    """
    0 background *; 1 aeroplane *; 2 bag *; 3 bed *; 4 bedclothes *; 5 bench *; 6 bicycle *;
    7 bird *; 8 boat *; 9 book *; 10 bottle *; 11 building *; 12 bus *; 13 cabinet *; 14 car *;
    15 cat *; 16 ceiling *; 17 chair *; 18 cloth *; 19 computer *; 20 cow *; 21 cup *;
    22 curtain *; 23 dog *; 24 door *; 25 fence *; 26 floor *; 27 flower *; 28 food *;
    29 grass *; 30 ground *; 31 horse *; 32 keyboard *; 33 light *; 34 motorbike *;
    35 mountain *; 36 mouse *; 37 person *; 38 plate *; 39 platform *; 40 pottedplant *;
    41 road *; 42 rock *; 43 sheep *; 44 shelves *; 45 sidewalk *; 46 sign *; 47 sky *;
    48 snow *; 49 sofa *; 50 table *; 51 track *; 52 train *; 53 tree *; 54 truck *;
    55 tvmonitor *; 56 wall *; 57 water *; 58 window *; 59 wood *
    """
)
