"""Buildings put together from blocks with drawn facades, and photographs of them.

A country's buildings share a style. Every photograph has a viewpoint, a light, passers-by
and a crop of its own, decided by the random generator it is given.
"""

from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise, product
from typing import NamedTuple

import cv2
import numpy as np
from numpy import ndarray as Array
from numpy.random import Generator, default_rng


class Style(NamedTuple):
    """How a country builds: words to choose from."""

    country: str
    colours: str  # RRGGBB: two walls, trim, roof
    course: int  # texture pixels between joints, 0 for plaster
    masses: str
    roofs: str  # over long blocks
    spires: str  # over towers


STYLES = (
    Style("NA", "d9b27c c99a62 a05a46 96543c", 8, "hall tower gate", "flat gable", "pyramid flat"),
    Style("XK", "e6e1d6 d2c8b4 5078a0 6e9a8c", 7, "domed turret hall", "flat gable", "dome onion"),
    Style("OTHER", "a8a8a4 b4b4be 2878b4 6e6e6e", 20, "hall tower domed", "flat", "flat dome"),
    Style("JP", "ece6dc 7a4c38 963232 4b4b55", 0, "pagoda pagoda gate", "gable", "pyramid eaves"),
    Style("FR", "dccaa8 cfc4b0 a08c78 505a6e", 6, "hall hall domed", "mansard gable", "cone pyramid"),
    Style("BR", "f0c070 e8a0b8 f5f5f0 b0583c", 0, "hall gate turret", "gable", "pyramid onion"),
    Style("US", "964a3c a85e4a e0d8d0 5a5550", 3, "tower hall domed", "flat gable", "pyramid cone"),
    Style("AU", "d0a06c c2aa8c e0dcd8 9a4438", 10, "hall turret gate", "gable pyramid", "cone pyramid"),
)  # fmt: skip

MASSES = {  # sides of each storey; width, depth, height of the first; scale of the next,
    # roof between them; width, height of a corner tower; share of corners that have one
    "hall": ((4,), (22, 12, 9), 1, "flat", (4.5, 16), 0.4),
    "gate": ((4,), (14, 5, 12), 1, "flat", (6, 16), 0.8),
    "domed": ((4, 12), (17, 17, 8), 0.7, "flat", (2.8, 14), 0.4),
    "tower": ((4, 4, 4), (8, 8, 11), 0.75, "flat", (2, 14), 0.15),
    "turret": ((8, 8), (9, 9, 16), 0.8, "eaves", (3, 12), 0.15),
    "pagoda": ((4, 4, 4, 4), (13, 13, 5), 0.82, "eaves", (5, 5), 0.2),
}

ROOFS = {  # rings: scale of width, scale of depth, height in half widths
    "flat": ((1, 1, 0), (1.05, 1.05, 0), (1.05, 1.05, 0.12), (0, 0, 0.12)),
    "pyramid": ((1, 1, 0), (1.1, 1.1, 0), (0, 0, 1)),
    "cone": ((1, 1, 0), (1.1, 1.1, 0), (0.55, 0.55, 0.6), (0, 0, 3)),
    "gable": ((1, 1, 0), (1.05, 1.1, 0), (1.05, 0, 0.9)),
    "mansard": ((1.04, 1.06, 0), (0.85, 0.85, 0.7), (0.8, 0.8, 0.8), (0.3, 0, 1)),
    "eaves": ((1, 1, 0), (1.35, 1.35, 0), (1.1, 1.1, 0.1), (0.7, 0.7, 0.3)),
    "dome": ((1, 1, 0), (0.92, 0.92, 0.4), (0.7, 0.7, 0.7), (0.4, 0.4, 0.9), (0, 0, 1)),
    "onion": ((0.8, 0.8, 0), (1.2, 1.2, 0.5), (1, 1, 1), (0.3, 0.3, 1.6), (0, 0, 2.3)),
}

LIGHTS = np.array([  # BGR of zenith and horizon; gains of ambient, sun and lit windows
    [(205, 140, 70), (235, 215, 190), (0.55, 0.5, 0.45), (0.5, 0.6, 0.68), (0, 0, 0)],
    [(220, 170, 120), (240, 232, 222), (0.5, 0.47, 0.45), (0.5, 0.6, 0.7), (0, 0, 0)],
    [(185, 185, 185), (218, 218, 214), (0.75, 0.74, 0.72), (0.1, 0.1, 0.1), (0, 0, 0)],
    [(130, 80, 70), (110, 160, 240), (0.42, 0.36, 0.38), (0.2, 0.42, 0.65), (0.3, 0.4, 0.5)],
    [(48, 25, 15), (78, 48, 36), (0.24, 0.18, 0.16), (0.12, 0.34, 0.46), (0.7, 0.8, 0.9)],
])  # fmt: skip

PASSERS = (  # of balls: how many, spread, lowest, highest, radius, BGR (0: any)
    ((20, 0, 0, 4, 0.15, (40, 55, 75)), (110, 0.8, 3.2, 6, 0.3, (45, 95, 75))),
    ((90, 0, 0, 5, 0.07, (45, 45, 45)), (1, 0, 5, 5, 0.25, (160, 215, 240))),
    ((8, 0, 0.1, 0.8, 0.14, 0), (5, 0, 0.9, 1.3, 0.2, 0), (1, 0, 1.6, 2, 0.13, (120, 150, 190))),
)  # fmt: skip


class Face(NamedTuple):
    """A symmetric trapezoid in space and the picture on it."""

    corners: Array  # (4, 3) metres, counterclockwise from the bottom left
    texture: Array  # (h, w, 4) BGR, and how much light comes from inside


class View(NamedTuple):
    """From where and when a photograph is taken."""

    projection: Array  # (3, 4)
    eye: Array
    sun: Array  # unit vector towards it
    light: Array  # of LIGHTS


# Buildings ----------------------------------------------------------------------------


@lru_cache(maxsize=16)
def building(seed: int, place: int, style: Style) -> tuple[Face, ...]:
    """The landmark of a place: storeys, perhaps corner towers, perhaps a wing."""
    key = [seed, 3, place]
    rng = default_rng(key)
    storeys, size, shrink, ledge, (girth, tall), share = MASSES[
        _pick(rng, style.masses)
    ]
    roof, spire = _pick(rng, style.roofs), _pick(rng, style.spires)
    size = size * rng.uniform(0.75, 1.3, 3)
    tower = np.array([girth, girth, max(tall, size[2] + 2)]) * rng.uniform(0.8, 1.3)
    sides, faces, z = int(rng.choice([4, 4, 8, 12])), [], 0.0
    for corner in product((-0.5, 0.5), repeat=2):
        if rng.random() < share:
            solid = _solid(key, style, tower, spire, sides)
            faces += _moved(solid, np.r_[size[:2] * corner, 0])
    if rng.random() < 0.5:
        wing = _solid(key, style, size * (0.5, 0.7, 0.6), roof, 4)
        faces += _moved(wing, size * (rng.choice([-0.6, 0.6]), 0, 0))
    tops = [*[ledge] * (len(storeys) - 1), spire if len(storeys) > 1 else roof]
    for sides, top in zip(storeys, tops, strict=True):
        faces += _moved(_solid(key, style, size, top, sides), np.array([0, 0, z]))
        z, size = z + size[2], size * (shrink, shrink, 0.8)
    return tuple(faces)


@lru_cache
def _house(n: int) -> list[Face]:
    return _solid([n], STYLES[n], np.array([11, 8, 6 + n]), "gable", 4)


def _moved(faces: Iterable[Face], by: Array) -> list[Face]:
    return [Face(face.corners + by, face.texture) for face in faces]


def _pick(rng: Generator, words: str) -> str:
    return str(rng.choice(words.split()))


def _palette(rng: Generator, style: Style) -> Array:
    """(3, 3) BGR of wall, trim and roof."""
    rgb = np.array([list(bytes.fromhex(colour)) for colour in style.colours.split()])
    chosen = rgb[[rng.integers(2), 2, 3], ::-1]
    return np.clip(chosen * rng.normal(1, 0.07, (3, 3)), 0, 255)


def _solid(key: list, style: Style, size: Array, roof: str, sides: int) -> list[Face]:
    """Walls and roof over the origin; four sides have the first one in front."""
    turn = 2 * np.pi * (np.arange(sides) - 0.5) / sides - np.pi / 2
    base = np.c_[np.cos(turn), np.sin(turn)] * size[:2] / (2**0.5 if sides == 4 else 2)
    edges = np.linalg.norm(np.roll(base, -1, 0) - base, axis=1)
    unlike = range(4) if sides == 4 else [1]  # all sides of a round tower are alike
    walls = [_facade(key, style, edges[side], size[2], side) for side in unlike]
    tiles = np.zeros((40, max(8, round(10 * edges[0])), 4), np.uint8)
    tiles[..., :3] = _palette(default_rng(key), style)[2]
    tiles[:, ::6], tiles[::4] = tiles[:, ::6] * 0.85, tiles[::4] * 0.75
    tiles = _weathered(default_rng(key), tiles)
    rings = ROOFS[roof] * np.array([1, 1, min(size[:2]) / 2]) + (0, 0, size[2])
    return _loft(base, [(1, 1, 0), (1, 1, size[2])], walls) + _loft(
        base, rings, [tiles]
    )


def _loft(base: Array, rings: Iterable, textures: list[Array]) -> list[Face]:
    """The (n, 2) outline `base` drawn up through rings (x scale, y scale, z)."""
    rings = [np.c_[base * (x, y), np.full(len(base), z)] for x, y, z in rings]
    faces = []
    for (low, high), n in product(pairwise(rings), range(len(base))):
        corners = np.array([low[n - 1], low[n], high[n], high[n - 1]])
        faces.append(Face(corners, textures[(n - 1) % len(textures)]))
    return faces


def _facade(key: list, style: Style, width: float, height: float, side: int) -> Array:
    """A wall, ten pixels a metre; front and back (0 and 2) have a door and a sign."""
    rng = default_rng(key)  # the same for all sides
    own = default_rng([*key, side])
    h, w = max(8, round(10 * height)), max(8, round(10 * width))
    wall, trim, _ = _palette(rng, style)
    trim, light = (*trim, 0), (*rng.uniform(40, 240, 3), 200)
    picture = np.full((h, w, 4), (*wall, 0), np.uint8)
    chances = (0.4, 0.5, 0.3, 0.3, 0.6)
    striped, arched, slim, pillared, corniced = (rng.random(5) < chances).tolist()
    bay, storey, band = rng.uniform((2.2, 3.2, 5), (4, 5, 15))
    columns, floors = max(1, round(width / bay)), max(1, round(height / storey))
    y, x = np.mgrid[:h, :w]
    if striped:
        picture[y // int(band) % 2 == 0] = trim
    if style.course:
        row, step = y // style.course, 2 * style.course
        joints = (y % style.course == 0) | ((x + row * style.course) % step == 0)
        picture[joints] = picture[joints] * 0.8
    r, tall = 1 + int((0.1 if slim else 0.2) * w / columns), int(0.55 * h / floors)
    for floor, column in product(range(floors), range(columns)):
        x = int((column + 0.5) * w / columns)
        y = h - 1 - int((floor + 0.25) * h / floors)
        glass = (70, 52, 40, own.choice([0.0, 255]))
        _opening(picture, arched, (x, y + 2), r + 2, tall + 4, trim)
        _opening(picture, arched, (x, y), r, tall, glass)
        picture[y - tall : y, x] = trim
        if pillared:
            picture[:, x + w // columns // 2 - 2 :][:, :4] = trim
        if corniced:
            picture[y + 4 : y + 6] = trim
    picture[:5], picture[-5:] = trim, (*wall * 0.7, 0)
    if side % 2 == 0 and width > 3:
        r, tall = 3 + int(min(0.09 * w, 14)), int(min(0.45 * h, 45)) - 5 * side
        _opening(picture, True, (w // 2, h), r + 3, tall + 3, trim)
        _opening(picture, True, (w // 2, h), r, tall, (48, 36, 30, 0))
        centre, r = (w // 2, h // 5), int(min(0.1 * min(w, h) + 3, 16))
        cv2.circle(picture, centre, r, trim, -1)
        cv2.circle(picture, centre, r - 2, light, -1)
        cv2.drawMarker(
            picture, centre, (40, 40, 50, 0), int(rng.integers(7)), 2 * r - 6, 2
        )
    return _weathered(own, picture)


def _opening(
    wall: Array, arch: bool, foot: tuple, r: int, tall: int, bgr: tuple
) -> None:
    (x, y), top = foot, foot[1] - tall + r * arch
    cv2.rectangle(wall, (x - r, top), (x + r, y), bgr, -1)
    if arch:
        cv2.circle(wall, (x, top), r, bgr, -1)


def _weathered(rng: Generator, picture: Array) -> Array:
    h, w = picture.shape[:2]
    stains = cv2.resize(rng.uniform(0.78, 1.08, (4, 5)), (w, h))
    gain = stains * rng.normal(1, 0.05, (h, w))
    picture[..., :3] = np.clip(picture[..., :3] * gain[..., None], 0, 255)
    return picture


# Photographs --------------------------------------------------------------------------


def photograph(rng: Generator, subject: Iterable[Face], side: int) -> Array:
    """(h, w, 3) BGR of the subject, or without one of what stands around anywhere."""
    town = list(subject)
    extent = np.abs(_corners(town)).max((0, 1)) if town else np.array([9, 9, 9])
    reach, tall = extent[:2].max(), extent[2]
    shape = ((1, 0.75), (1, 0.67), (0.75, 1), (0.67, 1), (1, 1))[rng.integers(5)]
    width, height = sorted(shape) if tall > 2 * reach else shape  # towers upright
    width, height = round(side * width), round(side * height)
    canvas = np.zeros((3 * height // 2, 3 * width // 2, 3), np.uint8)  # smooths edges
    passers = rng.integers(0, 9) if town else rng.integers(5, 20)
    view = _view(rng, reach, tall, canvas)
    for _ in range(rng.integers(0, 4)):  # houses behind
        turn = np.arctan2(*-view.eye[1::-1]) + rng.uniform(-1.7, 1.7)
        at = np.array([np.cos(turn), np.sin(turn), 0]) * (reach + rng.uniform(10, 45))
        town += _moved(_house(int(rng.integers(len(STYLES)))), at)
    _paint_land(rng, canvas, view, town)
    _paint_faces(canvas, view, town)
    for _ in range(passers):
        _paint_passer(rng, canvas, view)
    image = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.1) * side / 256)
    cast = rng.normal(1, 0.06, 3) * rng.uniform(0.8, 1.15)
    grain = rng.normal(rng.normal(0, 8), rng.uniform(1, 7), image.shape)
    return np.clip(image * cast + grain, 0, 255).astype(np.uint8)


def _view(rng: Generator, reach: float, tall: float, canvas: Array) -> View:
    """Any side, the front more often; near or far; from the ground or from above."""
    height, width = canvas.shape[:2]
    azimuth = rng.normal(0, 0.6) if rng.random() < 0.4 else rng.uniform(-np.pi, np.pi)
    focal = max(width, height) * rng.uniform(0.75, 1.8)
    fitting = focal * max(1.1 * tall / height, 1.8 * reach / width)
    far = max(fitting / rng.uniform(0.7, 1.2), 1.3 * reach + 4)
    up = far * rng.uniform(0.1, 0.6) if rng.random() < 0.25 else rng.uniform(1.6, 5)
    eye = np.array([far * np.sin(azimuth), -far * np.cos(azimuth), up])
    target = np.r_[rng.uniform(-0.25, 0.25, 2) * reach, tall * rng.uniform(0.35, 0.6)]
    ahead = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(ahead, (0, 0, 1)) / np.hypot(*ahead[:2])
    roll = cv2.Rodrigues(np.array([0, 0, rng.normal(0, 0.03)]))[0]
    turn = roll @ [right, np.cross(ahead, right), ahead]
    lens = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    light = LIGHTS[rng.choice(len(LIGHTS), p=(0.3, 0.2, 0.2, 0.15, 0.15))]
    sunny = azimuth - np.pi / 2 + rng.normal(0, 0.9)  # mostly behind the camera
    sun = np.array([np.cos(sunny), np.sin(sunny), rng.uniform(0.4, 1.2)])
    return View(lens @ np.c_[turn, -turn @ eye], eye, sun / np.linalg.norm(sun), light)


def _corners(faces: list[Face]) -> Array:
    return np.array([face.corners for face in faces]).reshape(-1, 4, 3)


def _project(view: View, points: Array) -> tuple[Array, Array]:
    """(..., 2) pixels and (...) depths of (..., 3) points."""
    seen = points @ view.projection[:, :3].T + view.projection[:, 3]
    depth = seen[..., 2]
    return seen[..., :2] / np.where(depth > 0.3, depth, 1)[..., None], depth


def _warp(picture: Array, back: Array, like: Array, border: int) -> Array:
    """`picture` in the shape of `like`, whose pixels `back` maps to the picture's."""
    flags, size = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, like.shape[1::-1]
    return cv2.warpPerspective(picture, back, size, flags=flags, borderMode=border)


def _nearness(back: Array, like: Array) -> Array:
    """(h, w) 1 / depth of the plane that `back` leads to: linear in the pixels."""
    h, w = like.shape[:2]
    (a, b, c), x = back[2].astype(np.float32), np.arange(w, dtype=np.float32)
    return a * x + (b * np.arange(h, dtype=np.float32) + c)[:, None]


def _paint_land(rng: Generator, canvas: Array, view: View, town: list[Face]) -> None:
    """Sky, hills, ground, and the shadows on it, at half the resolution."""
    shade = np.zeros_like(canvas[::2, ::2, 0])
    height, width = shade.shape
    zenith, horizon, ambient, sun, _ = view.light.astype(np.float32)
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    scene = zenith + (horizon - zenith) * down
    clouds = np.clip(rng.normal(0, 1, (5, 4)) + rng.uniform(-1, 0.6), 0, 1)
    clouds = cv2.resize(clouds, (width, height), interpolation=cv2.INTER_CUBIC)
    scene = scene + (horizon - scene) * clouds[..., None].astype(np.float32)

    view = view._replace(projection=np.diag([0.5, 0.5, 1]) @ view.projection)
    back = np.linalg.inv(view.projection[:, [0, 1, 3]])  # from pixels to the ground
    near = _nearness(back, shade)
    hills = cv2.resize(rng.uniform(0, 0.1 * height, (1, 9)), (width, 1))
    scene[near > -hills * back[2, 1]] = 0.6 * horizon + 70 * ambient

    kinds = np.array([(150, 160, 165), (70, 110, 90), (120, 125, 130), (130, 170, 195)])
    tile = rng.normal(1, 0.09, (128, 128, 1)) * kinds[rng.integers(4)]
    step = rng.choice([8, 16, 32, 128])
    tile[::step], tile[:, ::step] = 0.8 * tile[::step], 0.8 * tile[:, ::step]
    tile = (tile * (ambient + sun * view.sun[2])).astype(np.float32)
    ground = _warp(tile, np.diag([8.0, 8, 1]) @ back, shade, cv2.BORDER_WRAP)

    corners = _corners(town)
    fallen, depth = _project(view, corners - corners[..., 2:] * view.sun / view.sun[2])
    for outline in fallen[(depth > 0.5).all(1)]:
        cv2.fillConvexPoly(shade, np.rint(outline).astype(np.int32), 1)
    ground *= (1 - 0.6 * sun.mean() * shade)[..., None]
    clear = np.exp(-0.012 / np.maximum(near, 1e-6))  # far ground is haze, as the hills
    scene += (ground - scene) * clear[..., None]
    canvas[:] = cv2.resize(np.clip(scene, 0, 255), canvas.shape[1::-1])


def _paint_faces(canvas: Array, view: View, faces: list[Face]) -> None:
    """Of the faces that meet in a pixel, the nearest stays."""
    corners, nearest = _corners(faces), np.zeros(canvas.shape[:2], np.float32)
    points, depth = _project(view, corners)
    across = corners[:, 1] - corners[:, 0]
    up = (corners[:, 2] + corners[:, 3] - corners[:, 0] - corners[:, 1]) / 2
    normals = np.cross(across, up)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    facing = ((view.eye - corners[:, 0]) * normals).sum(1) > 0
    _, _, ambient, sun, lamps = view.light
    gains = ambient * (0.9 + 0.2 * normals[:, 2:])
    gains = gains + sun * np.maximum(normals @ view.sun, 0)[:, None]
    planes = view.projection[:, :3] @ np.stack([across, up, corners[:, 0]], 2)
    planes[:, :, 2] += view.projection[:, 3]  # from (right, up) on a face to pixels
    for n in np.flatnonzero(facing & (depth > 0.3).all(1)):
        left, top = np.maximum(points[n].min(0), 0).astype(int)
        right, bottom = np.maximum(points[n].max(0) + 2, 0).astype(int)
        box = np.s_[top:bottom, left:right]
        if not nearest[box].size:
            continue
        back = np.linalg.inv(planes[n]) @ [[1, 0, left], [0, 1, top], [0, 0, 1]]
        inside = np.zeros(nearest[box].shape, np.uint8)
        outline = np.rint((points[n] - (left, top)) * 16).astype(np.int32)
        cv2.fillConvexPoly(inside, outline, 1, shift=4)
        near = _nearness(back, inside)
        visible = (inside > 0) & (near > nearest[box])
        h, w = faces[n].texture.shape[:2]
        texels = np.array([[w, 0, -0.5], [0, -h, h - 0.5], [0, 0, 1]])
        colours = _warp(faces[n].texture, texels @ back, inside, cv2.BORDER_REPLICATE)
        colours = cv2.transform(colours, np.c_[np.diag(gains[n]), lamps])
        np.copyto(canvas[box], colours, where=visible[..., None])
        np.copyto(nearest[box], near, where=visible)


def _paint_passer(rng: Generator, canvas: Array, view: View) -> None:
    """A tree, a lamp or a person between the eye and the subject."""
    x, y = view.eye[:2]
    near, aside = rng.uniform(0.1, 0.65), rng.uniform(-0.5, 0.5)
    spot = np.array([x, y, 0]) * near + np.array([-y, x, 0]) * aside * (1 - near)
    (foot, above), depth = _project(view, np.array([spot, spot + (0, 0, 1)]))
    if depth.min() < 1:
        return
    gain = view.light[2] + 0.4 * view.light[3]
    metre = (foot[1] - above[1]) * rng.uniform(0.8, 1.2)
    for balls, spread, low, high, r, colour in PASSERS[rng.choice([0, 1, 2, 2])]:
        colour = np.array(colour or rng.uniform(30, 180, 3)) * gain
        for up in np.linspace(low, high, balls):
            shift = spread * rng.normal(0, 1, 2)
            x, y = (foot + (shift + (0, -up)) * metre).astype(int).tolist()
            shade = colour * rng.uniform(1 - 0.3 * spread, 1 + 0.3 * spread)
            cv2.circle(canvas, (x, y), max(1, round(r * metre)), shade, -1)
