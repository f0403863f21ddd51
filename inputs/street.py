"""street: a Cityscapes in miniature, drawn in memory. Nothing to download, nothing to store.

    from inputs.street import scene
    image, label = scene("train", 0)    # uint8 [64, 64, 3], uint8 [64, 64]

    $ python inputs/street.py sheet.png    # a contact sheet: image | coloured label

An image is a pure function of (split, index); the three splits draw from disjoint seeds. Few labels
hurt here for the reason they hurt in real streets: light, season, colours, camera and layout vary,
so colour does not tell road from sidewalk, rider from person or truck from car; shape and place do.
The classes run from a third of all pixels (road) to half a percent (rider, sign, pole).

How: world coordinates are metres (x to the right of the middle of the road, y up, z ahead of the
camera). Every stroke is painted on two canvases of three times the size, far objects first: its
colour on one, its class id on the other, without antialiasing. Colours are reduced by a box filter,
ids by taking the centre of each 3x3 block.
"""

import math
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw

CLASSES = (
    "road",
    "sidewalk",
    "building",
    "pole",
    "sign",
    "vegetation",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
)
PALETTE = [  # Cityscapes' colours
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (153, 153, 153),
    (220, 220, 0),
    (107, 142, 35),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
]
ROAD, SIDEWALK, BUILDING, POLE, SIGN, VEGETATION, SKY, PERSON, RIDER, CAR, TRUCK = range(11)
SIZE = 64
SPLITS = {"train": 1000, "val": 300, "test": 500}
FINE = 3  # canvas pixels per image pixel and side; odd, so that a block has a centre

# Colours in plain daylight. An image picks from these and jitters them.
ASPHALT = [
    (86, 86, 90),
    (106, 105, 104),
    (72, 77, 88),
    (120, 115, 108),
    (96, 90, 86),
    (134, 134, 138),
    (66, 64, 66),
]
PAVING = [
    (160, 156, 150),
    (178, 166, 148),
    (142, 146, 152),
    (186, 180, 172),
    (152, 128, 112),
    (128, 124, 120),
    (104, 102, 102),
    (166, 122, 102),
]
FACADES = [
    (204, 190, 160),
    (158, 86, 66),
    (180, 114, 86),
    (226, 212, 180),
    (210, 174, 112),
    (156, 156, 154),
    (126, 130, 138),
    (232, 230, 222),
    (158, 166, 148),
    (142, 160, 180),
    (196, 128, 98),
    (104, 94, 90),
]
ROOFS = [(146, 76, 58), (112, 66, 54), (86, 82, 84), (68, 70, 78), (124, 100, 84)]
LEAVES = [(46, 88, 42), (64, 108, 48), (88, 128, 54), (116, 142, 62), (72, 100, 62)]
AUTUMN = [(176, 144, 54), (192, 112, 48), (152, 66, 46), (120, 124, 54)]
PAINT = [
    (236, 236, 238),
    (190, 194, 200),
    (118, 122, 130),
    (40, 42, 48),
    (176, 36, 36),
    (44, 76, 146),
    (36, 84, 66),
    (206, 190, 150),
    (226, 182, 40),
    (206, 104, 40),
    (84, 146, 168),
    (104, 34, 44),
]
CLOTHES = [
    (44, 50, 74),
    (70, 70, 74),
    (172, 48, 48),
    (222, 218, 208),
    (58, 104, 148),
    (80, 112, 74),
    (208, 160, 66),
    (128, 84, 62),
    (150, 104, 140),
    (34, 34, 38),
    (214, 116, 62),
    (94, 120, 134),
]
SKIN = [(236, 196, 168), (214, 164, 130), (164, 112, 82), (112, 76, 56)]
HAIR = [(44, 34, 30), (96, 68, 44), (170, 140, 96), (150, 150, 150)]
GLASS = [(58, 66, 82), (76, 92, 112), (124, 144, 160), (46, 44, 50)]
BLACK, WHITE, RED, BLUE = (28, 28, 30), (240, 240, 238), (204, 34, 38), (34, 84, 170)
HEADLIGHT, LAMPLIGHT = (255, 246, 214), (250, 212, 136)

# Light: sky at the zenith and at the horizon, tint of what it falls on, haze, depth of shadows,
# share of lamps lit.
LIGHTS = [
    ((82, 138, 208), (196, 220, 238), (1.05, 1.03, 0.98), 0.25, 0.60, 0.0),  # clear day
    ((112, 160, 214), (222, 230, 234), (1.08, 1.02, 0.94), 0.35, 0.50, 0.0),  # sun and thin cloud
    ((150, 160, 172), (206, 210, 214), (0.86, 0.89, 0.93), 0.32, 0.28, 0.1),  # overcast
    ((178, 186, 190), (214, 216, 214), (0.90, 0.92, 0.92), 0.62, 0.22, 0.2),  # mist
    ((96, 112, 160), (250, 190, 128), (1.00, 0.82, 0.66), 0.45, 0.45, 0.3),  # low sun
    ((40, 52, 98), (176, 124, 128), (0.52, 0.54, 0.70), 0.40, 0.25, 0.7),  # dusk
]

# For wheels seen at an angle.
CIRCLE = [(math.cos(math.pi * i / 6), math.sin(math.pi * i / 6)) for i in range(12)]


# --------------------------------------------------------------------------------------------------
# Chance, camera, brush. `v`, the view, holds what a whole image shares: generator, camera, light,
# the two canvases.


def between(v, low, high):
    """A float drawn uniformly from [low, high)."""
    return low + (high - low) * v.rng.random()


def pick(v, options, jitter=0):
    """One of the options; with jitter a colour, moved by up to that, each channel by a third."""
    choice = options[int(v.rng.random() * len(options))]
    if jitter:
        common = between(v, -jitter, jitter)
        choice = [max(0, c + common + between(v, -jitter / 3, jitter / 3)) for c in choice]
    return choice


def project(v, x, y, z):
    """World metres -> canvas pixel. At the horizon z is infinite; `bend` curves the street."""
    away = 1 - v.near / z
    return (
        round((v.vanish + (x - v.offset) / z + v.bend * away * abs(away)) * v.pixels),
        round((v.horizon + (v.eye - y) / z) * v.pixels),
    )


def in_view(v, x):
    """The smallest z at which an object at x is inside the image."""
    return max(v.near, (x - v.offset) / (0.93 - v.vanish), (v.offset - x) / (v.vanish - 0.07))


def thin(v, z, metres, pixels=1.5):
    """Half the width of a bar of so many metres; at least so many image pixels, for the label."""
    return max(metres, pixels * FINE * z / v.pixels) / 2


def brush(v, cls, x, z, flip=1.0, tall=1.0):
    """
    A brush for an object of class cls at (x, z): strokes in metres from there, stretched by flip
    and tall. Class None does not change the label (shadows, halos). A glowing colour
    knows neither light nor haze; a colour with a fourth number is blended with that opacity.
    """
    fog = v.haze * max(0.0, 1 - v.near / z) ** 2
    # a colour is seen as colour * gain + haze
    tone = [(t * (1 - fog), h * fog) for t, h in zip(v.tint, v.horizon_colour, strict=True)]

    def stroke(shape, points, colour, light, glow):
        if not glow and len(colour) == 3:
            channels = zip(colour, tone, strict=True)
            colour = [min(255, c * gain * light + haze) for c, (gain, haze) in channels]
        getattr(v.paint, shape)(points, fill=tuple(map(int, colour)))
        if cls is not None:
            getattr(v.ids, shape)(points, fill=cls)

    def polygon(points, colour, light=1.0, glow=False):
        """Any outline: points (x, y) or (x, y, z)."""
        deep = [(*p, 0.0)[:3] for p in points]
        corners = [project(v, x + px * flip, py * tall, z + pz) for px, py, pz in deep]
        stroke("polygon", corners, colour, light, glow)

    def wall(at, y0, y1, z0, z1, colour, light=1.0, glow=False):
        """A rectangle along the street, x = at."""
        polygon([(at, y0, z0), (at, y1, z0), (at, y1, z1), (at, y0, z1)], colour, light, glow)

    def deck(x0, x1, z0, z1, colour, light=1.0, y=0.0):
        """A horizontal rectangle."""
        polygon([(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)], colour, light)

    def box(shape, x0, y0, x1, y1, colour, light=1.0, glow=False, z0=0.0, z1=0.0):
        a, b = project(v, x + x0 * flip, y0 * tall, z + z0)
        c, d = project(v, x + x1 * flip, y1 * tall, z + z1)
        stroke(shape, [min(a, c), min(b, d), max(a, c), max(b, d)], colour, light, glow)

    def face(*args, **options):
        """A rectangle that faces the camera: x0, y0, x1, y1, colour."""
        box("rectangle", *args, **options)

    def oval(at, y, rx, ry, *args, **options):
        """An ellipse that faces the camera: centre, radii, colour."""
        box("ellipse", at - rx, y - ry, at + rx, y + ry, *args, **options)

    return SimpleNamespace(polygon=polygon, wall=wall, deck=deck, face=face, oval=oval, box=box)


def draw_shadow(v, x, z, half, length):
    """A soft shadow on the ground, away from the sun: nested ellipses, so that its edge fades."""
    pen, shift = brush(v, None, x, z), -v.sun * half * 0.5 * v.shadow
    colour = (12, 14, 26, 110 * v.shadow)
    for grow in (1.35, 1.1, 0.85):
        left, right = shift - half * grow, shift + half * grow
        pen.box("ellipse", left, 0, right, 0, colour, z0=-0.25 * grow, z1=length * grow)


# --------------------------------------------------------------------------------------------------
# The stage.


def draw_sky(v):
    """Gradient, clouds, and the far end of the town on the horizon."""
    n, end = v.pixels, int(v.horizon * v.pixels) + 2
    v.ids.rectangle([0, 0, n, end], fill=SKY)
    for row in range(0, end, 3):
        channels = zip(v.zenith, v.horizon_colour, strict=True)
        colour = [int(a + (b - a) * row / end) for a, b in channels]
        v.paint.rectangle([0, row, n, row + 2], fill=tuple(colour))
    white = (*(int(220 + 0.3 * (c - 185)) for c in v.horizon_colour), 110)
    for _ in range(int(between(v, 0, 5))):
        cx, cy, width = between(v, 0, 1), between(v, 0.02, 0.8) * v.horizon, between(v, 0.1, 0.36)
        for _ in range(5):  # a cloud: translucent ellipses, flat below
            x, r = cx + between(v, -0.5, 0.5) * width, width * between(v, 0.15, 0.4)
            bounds = (x - r, cy - r * 0.35, x + r, cy + r * 0.3)
            v.paint.ellipse([round(b * n) for b in bounds], fill=white)
    x, trees = -60.0, between(v, 0, 1)
    while x < 60:  # 60 m away, a few pixels high
        width = between(v, 4, 12)
        if v.rng.random() < trees:
            tall, leaf = between(v, 3, 6), pick(v, v.leaves, 10)
            brush(v, VEGETATION, x, 60).oval(width / 2, 2, width / 2 + 2, tall, leaf, 0.85)
        elif v.rng.random() < 0.8:
            tall, facade = between(v, 5, 13), pick(v, FACADES, 12)
            brush(v, BUILDING, x, 60).face(0, 0, width, tall, facade, 0.8)
        x += width


def draw_ground(v):
    """Sidewalk, over it the road with kerbs and marks; in slices, for the bend and the haze."""
    w, asphalt, paving = v.half_road, pick(v, ASPHALT, 14), pick(v, PAVING, 14)
    mark, worn = pick(v, [(236, 236, 230), (226, 226, 214), (238, 208, 120)], 6), between(v, 0, 0.5)
    mark = [m + (a - m) * worn for m, a in zip(mark, asphalt, strict=True)]
    edge_lines, centre_line = v.rng.random() < 0.55, v.rng.random() < 0.85
    depths = [v.near * 0.8 * 1.25**i for i in range(15)] + [1e4]
    slices = [(z, far - z) for z, far in pairwise(depths)][::-1]
    kerb = [c * 0.4 + 128 for c in paving]
    brush(v, SIDEWALK, 0, 100).face(-99, -99, 99, v.eye, paving)
    for z, d in slices[1:]:
        brush(v, SIDEWALK, 0, z).deck(-99, 99, 0, d, paving)
    for i in range(16):  # joints of the paving, across and along
        z = v.near * 0.8 + 1.4 * i
        brush(v, SIDEWALK, 0, z).deck(-99, 99, 0, 0.06, paving, 0.78)
    for x in (-4.6, -3.1, -1.6, 1.6, 3.1, 4.6):
        line = [(0, 0, 0), (0.07, 0, 0), (0.07, 0, 4), (0.07, 0, 26), (0, 0, 26), (0, 0, 4)]
        brush(v, SIDEWALK, x + math.copysign(w, x), 4).polygon(line, paving, 0.78)
    for z, d in slices:
        brush(v, SIDEWALK, 0, z).deck(-w - 0.4, w + 0.4, 0, d, kerb)
        pen = brush(v, ROAD, 0, z)
        pen.deck(-w, w, 0, d, asphalt)
        for side in (-1, 1):
            pen.deck(side * w, side * (w - 0.25), 0, d, asphalt, 0.72)  # gutter
            if edge_lines:
                pen.deck(side * (w - 0.5), side * (w - 0.68), 0, d, mark)
    for _ in range(int(between(v, 0, 4))):  # patches of newer asphalt
        pen = brush(v, ROAD, between(v, -w, w - 1.5), between(v, v.near, 25))
        pen.deck(0, 1.5, 0, between(v, 1, 5), asphalt, 0.86)
    if centre_line:
        first, dash, period = between(v, 3, 6), between(v, 2, 3.5), between(v, 5, 8)
        for i in range(8):
            brush(v, ROAD, 0, first + i * period).deck(-0.1, 0.1, 0, dash, mark)
    if v.zebra:
        for i in range(int(2 * w - 1)):
            brush(v, ROAD, 0.5 - w + i, v.zebra).deck(0, 0.55, 0, 3, [c * 0.5 + 118 for c in mark])


def draw_building(v, side, x, z, length):
    """A house, its facade along the street at |x|, from z on; its near wall faces the camera."""
    pen = brush(v, BUILDING, side * x, z, flip=side)
    height = pick(v, v.storeys) * 2.6 + between(v, 0, 1.2)
    wall, roof = pick(v, FACADES, 12), pick(v, ROOFS, 12)
    glass, awning = pick(v, GLASS, 8), pick(v, CLOTHES, 10)
    # light on the facade, on the near wall
    facing, front = (1.0, 0.84) if side * v.sun < 0 else (0.72, 0.92)
    if v.rng.random() < 0.5:  # a gable; otherwise the roof is flat
        ridge = height + between(v, 1.5, 3)
        slope = [(0, height), (0, height, length), (5, ridge, length), (5, ridge)]
        pen.polygon(slope, roof, facing)
        pen.polygon([(0, height), (10, height), (5, ridge)], wall, front)
    pen.face(0, 0, 14, height, wall, front)
    pen.wall(0, 0, height, 0, length, wall, facing)
    pen.wall(0, height - 0.3, height, 0, length, roof, facing)  # cornice
    bays, shop = max(1, int(length / between(v, 2.4, 3.4))), v.rng.random() < 0.4
    for floor in range(int(height / 2.6) if z < 45 else 0):
        low, high = 2.6 * floor + 0.9, 2.6 * floor + 2.2
        for bay in range(3 if z < 30 else 0):
            pen.face(1 + 2.6 * bay, low, 2.3 + 2.6 * bay, high, glass, front)
        if floor == 0 and shop:
            pen.wall(0, 0.4, 2.1, 0, length, glass, facing)
            pen.wall(0, 2.1, 2.6, 0, length, awning, facing)
            continue
        for bay in range(bays):
            start, on = (bay + 0.25) * length / bays, v.rng.random() < v.lamps * 0.6
            end, colour = start + 0.5 * length / bays, LAMPLIGHT if on else glass
            bottom = 0 if floor == 0 and bay == bays // 2 else low  # a door in the middle
            pen.wall(0, bottom, high, start, end, colour, facing, glow=on)


# --------------------------------------------------------------------------------------------------
# The cast: each paints itself standing at (x, z).


def draw_tree(v, x, z, height):
    """A trunk and a crown of blobs, lit from the sun's side; below 2 m a bush."""
    pen, leaf = brush(v, VEGETATION, x, z), pick(v, v.leaves, 14)
    radius = height * between(v, 0.24, 0.36)
    middle = height - radius if height > 2 else height * 0.4
    if height > 2:
        trunk = [(-0.16, 0), (0.16, 0), (0.09, height * 0.6), (-0.09, height * 0.6)]
        pen.polygon(trunk, (92, 72, 56))
    blobs = [
        (between(v, -0.75, 0.75), between(v, -0.75, 0.6), between(v, 0.4, 0.7))
        for _ in range(7 if z < 20 else 4)
    ]
    # dark at the rim, bright towards the sun
    for light, size in ((0.72, 1.0), (1.0, 0.72), (1.25, 0.36)):
        for dx, dy, r in blobs:
            lift, reach = 1 - size, r * radius * size
            cx, cy = (dx + v.sun * lift * 0.4) * radius, middle + (dy + lift * 0.3) * radius
            pen.oval(cx, cy, reach, reach, leaf, light)


def draw_lamp(v, x, z):
    """A street lamp, its arm over the road."""
    pen, t = brush(v, POLE, x, z, flip=-math.copysign(1, x)), thin(v, z, 0.12)
    on = v.rng.random() < v.lamps
    steel = pick(v, [(92, 96, 98), (140, 142, 144), (62, 70, 66)], 8)
    pen.face(-t, 0, t, 5.2, steel)
    pen.face(0, 5.2 - 2 * t, 1.3, 5.2, steel)
    for r in (1.2, 0.9, 0.6, 0.4) if on else ():  # its halo
        brush(v, None, x - math.copysign(1.3, x), z).oval(0, 5.2, r, r, (255, 222, 150, 34))
    pen.face(0.95, 5.2 - 2.4 * t, 1.65, 5.2 + t, HEADLIGHT if on else steel, glow=on)


def draw_sign(v, x, z):
    """A sign on its post: speed limit, no entry, warning, priority, direction, parking."""
    kind, r, y, t = int(v.rng.random() * 6), between(v, 0.55, 0.75), 2.7, thin(v, z, 0.1)
    brush(v, POLE, x, z).face(-t, 0, t, y, (140, 142, 146))
    pen = brush(v, SIGN, x, z)

    def triangle(k, colour):
        half, bottom = 1.15 * k * r, y - 0.8 * k * r
        pen.polygon([(-half, bottom), (half, bottom), (0, y + 1.2 * k * r)], colour)

    if kind < 2:
        pen.oval(0, y, r, r, RED)
        if kind:
            pen.oval(0, y, 0.62 * r, 0.62 * r, WHITE)
        else:
            pen.face(-0.65 * r, y - 0.2 * r, 0.65 * r, y + 0.2 * r, WHITE)
    elif kind == 2:
        triangle(1.0, RED)
        triangle(0.5, WHITE)
    elif kind == 3:
        for k, colour in ((1.2, WHITE), (0.8, (240, 190, 40))):
            pen.polygon([(-k * r, y), (0, y - k * r), (k * r, y), (0, y + k * r)], colour)
    elif kind == 4:
        pen.oval(0, y, r, r, BLUE)
        pen.face(-0.15 * r, y - 0.6 * r, 0.15 * r, y + 0.6 * r, WHITE)
    else:
        pen.face(-0.95 * r, y - 0.95 * r, 0.95 * r, y + 0.95 * r, BLUE)
        triangle(0.5, WHITE)


def draw_person(v, x, z, height):
    """Someone standing or walking: legs, arms, coat, perhaps a bag, hair, face."""
    k = height / 1.75
    pen = brush(v, PERSON, x, z, k * pick(v, (-1, 1)), k)
    stride, hem = between(v, 0.02, 0.3), pick(v, (0.8, 0.8, 0.55))
    coat, trousers = pick(v, CLOTHES, 8), pick(v, CLOTHES[:5], 8)
    far_leg = [(-0.19, 0.85), (0.05, 0.85), (0.02 - stride, 0), (-0.18 - stride, 0)]
    pen.polygon(far_leg, trousers, 0.75)
    pen.polygon([(-0.05, 0.85), (0.19, 0.85), (0.18 + stride, 0), (-0.02 + stride, 0)], trousers)
    pen.polygon([(-0.26, 1.46), (-0.34, 0.8), (-0.22, 0.8), (-0.14, 1.2)], coat, 0.7)
    shoulders = [(-0.27, 1.44), (-0.12, 1.52), (0.12, 1.52), (0.27, 1.44)]
    pen.polygon([*shoulders, (0.22, hem), (-0.22, hem)], coat)
    pen.polygon([(0.24, 1.46), (0.36, 0.85), (0.24, 0.8), (0.15, 1.2)], coat, 0.85)
    if v.rng.random() < 0.3:
        pen.face(0.26, 0.45, 0.5, 0.8, pick(v, CLOTHES, 8))
    pen.oval(0, 1.64, 0.16, 0.18, pick(v, HAIR, 8))
    pen.oval(0.01, 1.59, 0.14, 0.14, pick(v, SKIN, 8))


def draw_rider(v, x, z):
    """A rider on a bicycle from the side, more or less turned. Between the spokes is rider too."""
    turn = pick(v, (-1, 1)) * between(v, 0.6, 1.0)
    pen, t = brush(v, RIDER, x, z, flip=turn), thin(v, z, 0.07, pixels=1.0)
    coat, trousers, frame = pick(v, CLOTHES, 8), pick(v, CLOTHES[:5], 8), pick(v, PAINT, 8)

    def bar(a, b, t, colour, light=1.0):
        (p, q), (r, s) = a, b
        pen.polygon([(p - t, q - t), (p + t, q + t), (r + t, s + t), (r - t, s - t)], colour, light)

    for wheel in (-0.56, 0.56):
        rim = [project(v, x + (wheel + 0.37 * c) * turn, 0.38 + 0.38 * s, z) for c, s in CIRCLE]
        v.ids.polygon(rim, fill=RIDER)
        tyre = tuple(int(36 * tint) for tint in v.tint)
        v.paint.line(rim + rim[:1], fill=tyre, width=max(2, round(0.09 / z * v.pixels)))
    hip, knee = (-0.12, 0.98), (0.22, 0.66)
    seat, pedals, handle = (-0.1, 0.85), (0.0, 0.32), (0.45, 0.85)
    bar((-0.56, 0.38), seat, t, frame)
    bar(seat, pedals, t, frame)
    bar(pedals, handle, t, frame)
    bar(seat, handle, t, frame)
    bar((0.56, 0.38), (0.42, 1.05), t, frame)
    for light, joint, foot in ((0.75, knee, (0.04, 0.22)), (1.0, (0.1, 0.6), (-0.08, 0.2))):
        bar(hip, joint, t * 1.8, trousers, light)
        bar(joint, foot, t * 1.5, trousers, light)
    pen.polygon([(-0.3, 0.95), (0.02, 0.9), (0.36, 1.42), (0.2, 1.6), (0.0, 1.55)], coat)
    bar((0.24, 1.4), (0.46, 1.06), t * 1.5, coat, 0.8)
    pen.oval(0.29, 1.67, 0.15, 0.17, pick(v, SKIN, 8))
    helmet = [(0.1, 1.7), (0.46, 1.72), (0.38, 1.9), (0.2, 1.92)]
    pen.polygon(helmet, pick(v, PAINT + CLOTHES[:3], 8))


def visible_flank(v, x, z):
    """Which side of a vehicle at (x, z) is seen (-1 left, 1 right), and how much light it gets."""
    side = 1 if project(v, x, 0, z + 4)[0] > project(v, x, 0, z)[0] else -1
    return side, 0.95 if side * v.sun > 0 else 0.7


def draw_car(v, x, z, view):
    """A car: "side" (crossing) as a profile; "behind", "oncoming" as body and cabin, one flank."""
    colour, glass = pick(v, PAINT, 10), (54, 64, 78)
    roof, night = between(v, 1.42, 1.7), v.lamps > 0.25
    if view == "side":
        pen = brush(v, CAR, x, z, flip=pick(v, (-1, 1)))
        back = [(-2.1, 0.25), (-2.1, 0.9), (-1.7, 0.98), (-1.1, roof)]
        front = [(0.5, roof), (1.15, 0.95), (2.0, 0.82), (2.1, 0.25)]
        pen.polygon(back + front, colour)
        pen.face(-2.1, 0.25, 2.1, 0.5, colour, 0.7)
        top = roof - 0.12
        pen.polygon([(-1.45, 0.95), (-1.0, top), (-0.35, top), (-0.35, 0.95)], glass)
        pen.polygon([(-0.2, 0.95), (-0.2, top), (0.4, top), (0.9, 0.95)], glass, 1.15)
        pen.face(1.8, 0.6, 2.06, 0.76, HEADLIGHT, glow=night)
        pen.face(-2.1, 0.66, -1.9, 0.84, RED, glow=night)
        for wheel in (-1.3, 1.3):
            pen.oval(wheel, 0.36, 0.38, 0.36, BLACK)
            pen.oval(wheel, 0.36, 0.18, 0.18, (150, 150, 152))
        return
    side, flank = visible_flank(v, x, z)
    pen, oncoming, belt = brush(v, CAR, x, z, flip=side), view == "oncoming", 0.88
    b0, b1 = (1.1, 4.0) if oncoming else (0.25, 3.1)  # the cabin's bottom
    t0, t1 = (1.75, 3.6) if oncoming else (0.85, 2.4)  # the cabin's top
    for tyre in (-0.78, 0.5):
        pen.face(tyre, 0, tyre + 0.28, 0.4, BLACK)
    pen.wall(0.9, 0.25, belt, 0, 4.1, colour, flank)
    for wheel in (0.8, 3.2):
        pen.polygon([(0.9, 0.34 + 0.34 * s, wheel + 0.36 * c) for c, s in CIRCLE], BLACK)
    pen.deck(-0.9, 0.9, 0, 4.1, colour, 1.1, y=belt)
    windows = [(0.86, belt, b0), (0.72, roof, t0), (0.72, roof, t1), (0.86, belt, b1)]
    pen.polygon(windows, glass, flank)
    pen.deck(-0.72, 0.72, t0, t1, colour, 1.15, y=roof)
    cabin = [(-0.86, belt, b0), (-0.72, roof, t0), (0.72, roof, t0), (0.86, belt, b0)]
    pen.polygon(cabin, colour, 0.9)
    low, high = belt + 0.06, roof - 0.1
    pane = [(-0.74, low, b0), (-0.62, high, t0), (0.62, high, t0), (0.74, low, b0)]
    pen.polygon(pane, (96, 116, 134) if oncoming else glass)
    pen.face(-0.9, 0.24, 0.9, belt, colour, 0.85)
    pen.face(-0.9, 0.24, 0.9, 0.42, (52, 52, 56))  # bumper
    pen.face(-0.26, 0.4, 0.26, 0.54, WHITE)  # plate
    for lamp in (-0.86, 0.56):
        pen.face(lamp, 0.56, lamp + 0.3, 0.76, HEADLIGHT if oncoming else RED, glow=night)


def draw_truck(v, x, z, view):
    """A truck: a cab and a taller cargo box, in the same three views."""
    cab, steel, night = pick(v, PAINT, 10), (58, 58, 62), v.lamps > 0.25
    white, colours = (232, 232, 230), [(190, 60, 48), (70, 104, 150), (92, 122, 96)]
    cargo = pick(v, [cab, white, (206, 200, 188), *colours], 8)
    if view == "side":
        pen = brush(v, TRUCK, x, z, flip=pick(v, (-1, 1)))
        pen.face(-2.9, 0.4, 2.7, 0.75, steel)
        pen.face(-3.0, 0.7, 1.3, 3.0, cargo)
        pen.face(-3.0, 1.5, 1.3, 2.0, pick(v, PAINT, 10), 0.9)  # a stripe
        pen.polygon([(1.4, 0.5), (1.4, 2.4), (2.4, 2.4), (2.9, 1.4), (2.9, 0.5)], cab)
        pen.polygon([(1.75, 1.4), (1.75, 2.15), (2.3, 2.15), (2.65, 1.4)], GLASS[1])
        for wheel in (-2.1, -1.2, 2.0):
            pen.oval(wheel, 0.43, 0.44, 0.43, BLACK)
            pen.oval(wheel, 0.43, 0.18, 0.18, (140, 140, 142))
        return
    side, flank = visible_flank(v, x, z)
    pen, oncoming = brush(v, TRUCK, x, z, flip=side), view == "oncoming"
    start = 1.9 if oncoming else 0.0  # where the box begins: behind the cab, or right here
    for tyre in (-1.1, 0.7):
        pen.face(tyre, 0, tyre + 0.4, 0.6, BLACK)
    pen.wall(1.15, 0.35, 0.75, 0, 6.5, steel)
    for wheel in (1.2, 5.2):
        pen.polygon([(1.15, 0.43 + 0.43 * s, wheel + 0.43 * c) for c, s in CIRCLE], BLACK)
    pen.wall(1.15, 0.6, 2.3, 4.9, 6.5, cab, flank)
    pen.wall(1.15, 0.7, 3.0, start, start + 4.8, cargo, flank)
    pen.deck(-1.15, 1.15, start, start + 4.8, cargo, 1.12, y=3.0)
    corners = ((-1.15, 0.7), (-1.15, 3.0), (1.15, 3.0), (1.15, 0.7))
    pen.polygon([(*corner, start) for corner in corners], cargo, 0.88)
    if oncoming:
        pen.wall(1.1, 0.4, 2.4, 0, 1.7, cab, flank)
        pen.face(-1.1, 0.4, 1.1, 2.4, cab, 0.95)
        pen.face(-0.95, 1.3, 0.95, 2.15, GLASS[1])
        pen.face(-0.7, 0.75, 0.7, 1.05, steel)
    else:
        pen.face(-0.04, 0.7, 0.04, 3.0, cargo, 0.6)  # between the doors
        pen.face(-1.15, 0.4, 1.15, 0.7, steel)
    for lamp in (-1.05, 0.75):
        pen.face(lamp, 0.45, lamp + 0.3, 0.68, HEADLIGHT if oncoming else RED, glow=night)


# --------------------------------------------------------------------------------------------------
# The image.


def draw_houses(v):
    """Two rows of houses; trees or hedges in the gaps between them."""
    w, chance = v.half_road, v.rng.random
    for side in (-1, 1):
        x, z = w + between(v, 3.4, 7.0), between(v, 3, 7)
        built, row = pick(v, (0.3, 0.65, 0.95)), []
        while z < 75:
            row.append((z, between(v, 6, 13), chance() < built))
            z += row[-1][1] + (between(v, 0, 4) if chance() < 0.4 else 0)
        for z, length, house in reversed(row):
            if house:
                draw_building(v, side, x, z, length)
            elif z > 6 and chance() < 0.75:
                for _ in range(2):
                    at, far = side * (x + between(v, 1, 4)), z + length * chance()
                    draw_tree(v, at, far, between(v, 1.5, 6.0))


def populate(v):
    """Places the actors; paints houses, then all shadows, then the actors from far to near."""
    w, chance, cast = v.half_road, v.rng.random, []

    def place(paint, x, z, half, length, *args):
        """Adds an actor, unless its place (2 * half wide, length deep) is taken."""
        for oz, ox, other, depth, _, _ in cast:
            if abs(x - ox) <= half + other and z <= oz + depth and oz <= z + length:
                return
        cast.append((z, x, half, length, paint, args))

    draw_houses(v)
    trucks = 1 if chance() < 0.36 else 0
    for lane in (-1, 1):  # traffic keeps to the right, or where v.drives is -1 to the left
        view, parked = "behind" if lane == v.drives else "oncoming", chance() < 0.22 and w > 3.3
        z = between(v, 6.5, 20)
        for _ in range(pick(v, (0, 1, 1, 2))):
            x = lane * w * (0.25 if parked else 0.5) + between(v, -0.2, 0.2)
            turned = chance() < 0.12
            car = trucks < 1 or chance() < 0.4
            paint, half, length = (draw_car, 0.95, 4.2) if car else (draw_truck, 1.2, 6.6)
            trucks -= paint is draw_truck
            if turned:
                place(paint, x, max(z, 9), 2.9 if paint is draw_truck else 2.1, 1.5, "side")
            else:
                place(paint, x, max(z, 8) if paint is draw_truck else z, half, length, view)
            z += between(v, 8, 16)
        z = between(v, 7, 14)
        for i in range(int(between(v, 1, 6)) if parked else 0):  # along the kerb
            place(draw_car, lane * (w - 0.95), z + 5.4 * i, 0.85, 4.2, view)

    if chance() < 0.6:
        for _ in range(pick(v, (2, 3, 4, 4, 6))):
            crossing = chance() < (0.5 if v.zebra else 0.12)
            x = between(v, -w, w) if crossing else pick(v, (-1, 1)) * (w + between(v, 0.6, 2.6))
            if v.zebra and crossing:
                z = v.zebra + between(v, 0.3, 2.5)
            else:
                z = in_view(v, x) + between(v, 0, 5)
            place(draw_person, x, z, 0.35, 0.5, between(v, 1.6, 2.0))
    if chance() < 0.3:
        for _ in range(pick(v, (1, 1, 2))):
            x = pick(v, (-1, 1)) * (w + between(v, -1.6, 0.6))
            place(draw_rider, x, in_view(v, x) + between(v, 0, 4), 0.8, 0.5)
    if chance() < 0.36:
        for _ in range(pick(v, (1, 1, 2))):
            x = pick(v, (-1, 1)) * (w + between(v, 0.6, 1.2))
            place(draw_sign, x, in_view(v, x) + between(v, 0, 4), 0.3, 0.3)
    if chance() < 0.36:  # street lamps on one side
        x, z, gap = pick(v, (-1, 1)) * (w + 0.7), between(v, 8, 16), between(v, 14, 20)
        for i in range(2):
            place(draw_lamp, x, z + i * gap, 0.3, 0.3)
    for side in (-1, 1):  # street trees
        if chance() < 0.45:
            z, gap = between(v, 8, 14), between(v, 7, 12)
            for i in range(4):
                place(draw_tree, side * (w + 1.6), z + i * gap, 0.8, 1.2, between(v, 3.6, 5.2))

    cast.sort(key=lambda actor: -actor[0])
    for z, x, half, length, _, _ in cast:
        draw_shadow(v, x, z, half * 1.15, length)
    for z, x, _, _, paint, args in cast:
        paint(v, x, z, *args)


def scene(split: str, index: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """
    Draws image `index` of a split ("train", "val", "test"); the same arguments give the same bits.
    Returns (image, label): uint8 [size, size, 3] RGB, and uint8 [size, size] class ids 0..10, none
    of them void. Size changes the resolution, not what is seen. ValueError for a split or an index
    that does not exist.
    """
    if split not in SPLITS:
        raise ValueError(f"street has no split {split!r}; there are {', '.join(SPLITS)}")
    if not 0 <= index < SPLITS[split]:
        raise ValueError(
            f"street's split {split} holds images 0 to {SPLITS[split] - 1}, not {index}"
        )
    rng = np.random.default_rng([list(SPLITS).index(split), int(index)])
    canvas = Image.new("RGB", (size * FINE, size * FINE))
    ids = Image.new("L", canvas.size)
    v = SimpleNamespace(
        rng=rng, pixels=size * FINE, paint=ImageDraw.Draw(canvas, "RGBA"), ids=ImageDraw.Draw(ids)
    )

    v.zenith, v.horizon_colour, v.tint, v.haze, v.shadow, v.lamps = pick(v, LIGHTS)
    v.sun = pick(v, (-1, 1))  # its side
    v.drives = pick(v, (1, 1, 1, -1))  # the side of the traffic
    v.horizon = between(v, 0.27, 0.43)  # vanishing point, in image heights ...
    v.vanish = between(v, 0.36, 0.64)  # ... and widths
    v.near = between(v, 4.8, 6.2)  # z of the lower edge, metres
    v.offset = between(v, -2.2, 2.2)  # the camera's x, metres
    v.eye = (1 - v.horizon) * v.near  # height of the camera, which follows
    v.bend, v.half_road = between(v, -0.16, 0.16), between(v, 2.7, 4.2)
    v.storeys = pick(v, ((1, 2), (2, 3), (2, 3, 4)))
    v.leaves = [pick(v, LEAVES + AUTUMN if v.rng.random() < 0.3 else LEAVES, 10) for _ in range(3)]
    v.zebra = between(v, 7, 15) if v.rng.random() < 0.25 else 0.0  # z of a crossing, if any

    draw_sky(v)
    draw_ground(v)
    populate(v)

    # The sensor: exposure and white balance, then grain (four bytes added up: nearly normal, with a
    # spread of 148). All in integers.
    exposure = between(v, 215, 295)
    gain = [int(exposure * between(v, 0.94, 1.06)) for _ in range(3)]
    grain = rng.integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    grain = (grain.sum(0, dtype=np.int32) - 510) * int(between(v, 3, 13))
    image = (np.asarray(canvas.reduce(FINE), dtype=np.int32) * gain + grain) >> 8
    label = np.asarray(ids)[FINE // 2 :: FINE, FINE // 2 :: FINE]
    return image.clip(0, 255).astype(np.uint8), label.copy()


def contact_sheet(path, rows=6, columns=6, zoom=3):
    """Write the first training images as one PNG, each as image | coloured label, enlarged."""
    sheet = []
    for row in range(rows):
        pairs = [scene("train", row * columns + column) for column in range(columns)]
        sides = [side for image, label in pairs for side in (image, np.uint8(PALETTE)[label])]
        sheet.append(np.hstack(sides))
    sheet = Image.fromarray(np.vstack(sheet))
    sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python street.py SHEET.png")
    contact_sheet(sys.argv[1])
