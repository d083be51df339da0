"""Byte shuffle and the entropy coder for quantised weights."""

import base64
import zlib

import numpy as np
import pytest

from model.static_decoder import decode_static
from pgolf_kernels import _native
from pgolf_kernels.packing import (
    _varint,
    byte_shuffle,
    byte_shuffle_reference,
    byte_unshuffle,
    decode_codes,
    encode_codes,
)
from tests.golden import load_npz

GOLDEN = load_npz("byte_shuffle.npz")
SHUFFLED = [name for name in GOLDEN if name.startswith("pr")]


@pytest.mark.parametrize("name", SHUFFLED)
def test_byte_shuffle_golden(name: str) -> None:
    system, length, stride = name.split(".")
    data = GOLDEN[f"in.{length}"].tobytes()
    header = system == "pr1530"
    options = {"tail": "strided" if header else "appended"}
    expected = GOLDEN[name].tobytes()
    assert byte_shuffle(data, int(stride[1:]), header=header, **options) == expected
    assert byte_unshuffle(expected, None if header else int(stride[1:]), **options) == data


@pytest.mark.parametrize("name", [n for n in GOLDEN if n.startswith("odd.") and n.endswith(".in")])
def test_byte_unshuffle_golden_of_odd_input(name: str) -> None:
    assert byte_unshuffle(GOLDEN[name].tobytes()) == GOLDEN[name.replace(".in", ".out")].tobytes()


@pytest.mark.parametrize("tail", ["strided", "appended"])
@pytest.mark.parametrize("stride", range(1, 17))
def test_byte_shuffle_every_stride_and_length(stride: int, tail: str) -> None:
    generator = np.random.default_rng(stride)
    for size in [*range(0, 70), 16 * stride - 1, 32 * stride, 33 * stride + 5, 4099]:
        data = generator.integers(0, 256, size, dtype=np.uint8).tobytes()
        shuffled = byte_shuffle(data, stride, tail=tail)
        assert shuffled == byte_shuffle_reference(data, stride, tail)
        assert byte_unshuffle(shuffled, stride, tail=tail) == data


def test_byte_shuffle_reads_any_buffer_and_writes_into_out() -> None:
    source = np.arange(1000, dtype=np.uint16)
    expected = byte_shuffle_reference(source.tobytes(), 2)
    out = np.full(2100, 7, np.uint8)
    written = byte_shuffle(memoryview(source), 2, out=out)
    assert isinstance(written, memoryview) and written == expected
    assert out[:2000].tobytes() == expected and (out[2000:] == 7).all()
    assert byte_unshuffle(written, 2, out=bytearray(2000)) == source.tobytes()
    with_header = byte_shuffle(source, 2, header=True, out=bytearray(2005))
    assert byte_unshuffle(with_header) == source.tobytes()


def test_byte_shuffle_refuses() -> None:
    data = bytes(100)
    for stride in (0, 17, -1):
        with pytest.raises(ValueError, match="stride"):
            byte_shuffle(data, stride)
    with pytest.raises(ValueError, match="tail"):
        byte_shuffle(data, 2, tail="cut")
    with pytest.raises(ValueError, match=r"out: got 99 bytes, wanted at least 100"):
        byte_shuffle(data, 2, out=bytearray(99))
    with pytest.raises(TypeError, match="read-only"):
        byte_shuffle(data, 2, out=bytes(100))
    both = bytearray(200)
    with pytest.raises(ValueError, match="overlaps"):
        byte_shuffle(memoryview(both)[:100], 2, out=memoryview(both)[50:150])
    with pytest.raises(BufferError, match="contiguous"):
        byte_shuffle(np.zeros((8, 8), np.uint8)[:, ::2])
    with pytest.raises(ValueError, match="stride: got 200"):
        byte_unshuffle(b"BSHF\xc8data")


# --- entropy coding ---

MODES = ("static", "context")
FIRST_RELEASE = {
    "static": (
        "P)9>CQzs-wI|C>P0+s;*0Y(G?0Qw97`1kGQ>EPk#<l^r0|AGDh{{R3000030{{a900RI60{{a900RI60{{a900RI60{{a600RI60"
        "{{a60|Nj90{{a60|Nj90{{a60|Nj90{{a60|Nj9000930|Nj900RR60|Nj900RR60|Nj900RR60|Nj900RR60{{R600RR60{{a90"
        "0RR60{{a900RR60{{a900RR60{{a900RI30{{a900RI60{{a900RI60{{a900RI60{{a900RI60{{a600RI60{{a60|Nj90{{a60"
        "|Nj90{{a60|Nj90{{a60|Nj9000930|Nj900RR60|Nj900RR60|Nj900RR60|Nj900RR8!GyuZV!ot$R($d@8;?m~g=H~L|^zZca"
        "`1Jqy`1t$u`1tnk@8b04;^OPl+v3~O(!$ch!qUPibO`_m^2zPG^C=1yE5};3%N+CGCH!=tLqb45xd)QN6MJg_t<AP_q%F9BLA`Ec"
        "{R*_Fc`i4KZGbJqVk&8Wk&yZh);acYsD6@n6P$N)-F?YYWszA8&|GUnx+RBQd99BRRZWQ*b`|_s<wGbS{LZ$|u?vrw>#S4K5{dv$"
        "U*3&fsD}5CgZFiqGQkDktE#}$Nkd|~rvUGwblF-Mb~W#}+kR*Vd3_&uYSF;j*bdWF1!3=Nuv=>@`_dp8U@ZuJZ0mFH2rN~Rd;Gr;"
        "2pO2xi|<Y|USU+|JnnPLF}Bw^K}gb;Mj|=dnLO|nz>Y1ZL-uewDN$X1wS%e8xFzNM`FC!dk0B{7bQi3V#5y`(UqioS@_)z;Lc}*C"
        "H>8tk<_!6()oW-$yMxZ9YD2waP+8;nH8he1<(D`A%ATFbxe`tJpQy49kM|*wbmzyF+6K3S$wV9oFQki&9!W8IgkqPZvzA7D*+uNc"
        "{x_Q)t{TDc6AUn3L-3WzsI5Cw82;+Fy(1C7Bj^8pQbT1rIGWU{XG3~;%}t<mywuNbVoLQD&Rjs$3tb{xYzHs8f80tQR^ei(as>Oi"
        "jR96e45R3Cb0QT1z}VGGTJWffxedE9+Dn6gm6b82@zFk|LwFQeqnRwXdN)SUlwHVxA^>u|Y7>8S%HSIDXzi{UIUZ2G!8(!TrZq8W"
        "xeEb-(ZA!$<XiE3c083&MVQ+EBjsrkK0yX>*^Qh}Xv+5xiIH9Zj8EoAE+KLFzame$Ave;k^Ugap6%K=&O(P=_YPtJhL^w{Wo{e9B"
        "w8lF"
    ),
    "context": (
        "P)9>CLvn=#wgV^#0+s;*0Y(G?003gV0ssS|m;nI-cDe!N0{<4w;OJ6B4!5ok@OM0MlbqjCLjLQ{zPD^9ek~5!MC|)1!NMhPq!fct"
        "_cN>V;`!3NUAhBs>Eu>!A*B1;s-_IXPo!K_;p(V(1w3|S9X6qt(=^1G1!@0ItRZQkIET;Cj;u^4_eEt%46u`+u#~5DY(wUN4U-ZM"
        "C3s;l;Kw{PW8R%nkZ1E7;zg%gi#iv1bqtp*JJK)!?88&&w|J7oNKp;uur*M#P14~9ZY$T;Sm5RoCr>g@1(ph0<mao=7$uI)ej9Im"
        "=}HG1bQb8rfis#vp*^(pKPyy^-k6k;isDtnDtafvf*^4=8jyY(jz}~+vCkZ3tv!ec(+Klw_c1CF6!O7RH@j9U=%6yrW6!l#)GBeD"
        "^+G|=dIoYEi%VSR`y(;8^QyX}(h4@2U|SiR0A_~)mrkSr`0x*N2m5v>v~r}}eq2Hh!nn^|)+PG|I(0e@Zo$;nGJ|S@Q<1?e0|J|V"
        "Z$eV%8yzgnFWp=>%>cb?rGeU*2Cv-Y>`oo13v-$L$DXw_x)<Mw_ndb#))1Iw&QD^#oYxb5TM+E4RmOHvvto5yOE(+aGNNwso-v01"
        "_Gu$04FX&Exh!P83B?|aN^|Eb82$q_TNbS+@918-@WO{K^*IlR@2&u<^C)TUwzR{AmHy^TAf~3;^1V0pL8fZHphEx)b<9g-HPuqm"
        "`qW_Nnf+S~9q5}5h(t!^c4v0DkF(`SdY#p<6eXsQk%_zmw%-Q$>9`8JhB(*OMVIMI&Ga7=!t0Y=3%l6+SsE*ne5HIWg>s)|;6{Y1"
        "dVM)%`4rCXamdo`zd)dtNAV*k{itz?A^Bp!mB!ws4v^#~nC0|Eguv@6_ou^V>;"
    ),
}


def _cases() -> dict[str, list[np.ndarray]]:
    draw = np.random.default_rng(7)

    def gaussian(rows: int, cols: int, deviation: float = 2.4) -> np.ndarray:
        columns = deviation * np.exp(draw.normal(0, 0.2, cols))
        return (draw.normal(0, 1, (rows, cols)) * columns).round().clip(-128, 127).astype(np.int8)

    correlated = np.outer(draw.normal(0, 1, 900), draw.normal(0, 6, 40)) + draw.normal(0, 2, (900, 40))
    return {
        "nothing": [],
        "empty": [np.zeros((0, 5), np.int8), np.zeros((5, 0), np.int8), np.zeros((0, 0), np.int8)],
        "one": [np.array([[-128]], np.int8)],
        "extremes": [np.full((30, 40), -128, np.int8), np.full((30, 40), 127, np.int8)],
        "constant": [np.zeros((2000, 7), np.int8)],
        "uniform": [draw.integers(-128, 128, (130, 17)).astype(np.int8)],
        "wide": [gaussian(3, 5000)],
        "row": [gaussian(1, 777), gaussian(1, 777)],
        "column": [gaussian(5000, 1, 40)],
        "layers": [gaussian(64, 96) for _ in range(4)] + [gaussian(96, 64)] + [gaussian(64, 96)],
        "correlated": [correlated.round().clip(-128, 127).astype(np.int8)],
        "pattern": [np.tile(np.arange(-60, 60, dtype=np.int8), (700, 1))],
        "not contiguous": [gaussian(64, 64).T, gaussian(64, 64)[::2, ::3]],
    }


CASES = _cases()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_codes_round_trip(name: str, mode: str) -> None:
    matrices = CASES[name]
    data = encode_codes(matrices, mode=mode)
    assert data == encode_codes(matrices, mode=mode, threads=3), "the bytes depend on the threads"
    decoded = decode_codes(data, shapes=[m.shape for m in matrices], threads=2)
    assert len(decoded) == len(matrices)
    for got, wanted in zip(decoded, matrices, strict=True):
        assert got.dtype == np.int8 and np.array_equal(got, wanted)


def _bits_per_code(matrix: np.ndarray) -> float:
    """Order-0 entropy."""
    counts = np.unique(matrix, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def test_sizes_come_near_the_entropy_and_below() -> None:
    draw = np.random.default_rng(3)
    plain = (draw.normal(0, 2.4, (2048, 512))).round().astype(np.int8)
    entropy = _bits_per_code(plain) * plain.size / 8
    assert len(encode_codes([plain], mode="static")) < 1.002 * entropy
    assert len(encode_codes([plain], mode="context")) < 1.001 * entropy
    spread = (draw.normal(0, 2.4, (2048, 512)) * np.exp(draw.normal(0, 0.3, 512))).round().astype(np.int8)
    entropy = _bits_per_code(spread) * spread.size / 8
    static, context = (len(encode_codes([spread], mode=mode)) for mode in MODES)
    assert static < 0.975 * entropy
    assert context < static


@pytest.mark.parametrize("mode", MODES)
def test_damaged_codes_are_refused(mode: str) -> None:
    matrices = CASES["layers"]
    data = encode_codes(matrices, mode=mode)
    for size in range(0, len(data), 101):
        with pytest.raises(ValueError, match="coded matrices"):
            decode_codes(data[:size])
    for place in range(0, len(data), 97):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(ValueError, match="coded matrices"):
            decode_codes(damaged)
    with pytest.raises(ValueError, match="other shapes"):
        decode_codes(data, shapes=[(1, 1)])


@pytest.mark.parametrize("mode", MODES)
def test_damage_behind_a_checksum_that_fits_never_harms(mode: str) -> None:
    """The decoders themselves: whatever the bytes, an answer of the right shapes or ValueError."""
    draw = np.random.default_rng(11)
    refused = 0
    for name in ("layers", "correlated", "column", "uniform"):
        data = encode_codes(CASES[name], mode=mode)
        for _ in range(60):
            body = bytearray(data[9:])
            for place in draw.integers(0, min(len(body), 400), 3):
                body[place] = draw.integers(0, 256)
            try:
                decode_codes(
                    data[:5] + zlib.crc32(body).to_bytes(4, "little") + body, shapes=[m.shape for m in CASES[name]]
                )
            except ValueError:
                refused += 1
    assert refused > 100


def test_a_variance_that_no_int8_codes_have_is_refused() -> None:
    matrix = np.where(np.arange(6000).reshape(60, 100) % 2, 127, -128).astype(np.int8)
    data = encode_codes([matrix], mode="context")
    # 9 bytes of container, then the count, rows, columns and kind of the matrices; flags, centre, variance.
    assert list(data[9:16]) == [1, 60, 100, 1, 0, 255, 175]
    body = bytearray(data[9:])
    body[6] = 177
    with pytest.raises(ValueError, match="variance"):
        decode_codes(data[:5] + zlib.crc32(body).to_bytes(4, "little") + body)


def test_sizes_are_checked_before_anything_is_allocated() -> None:
    body = bytes([1, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F, 1])
    data = b"PGC1S" + zlib.crc32(body).to_bytes(4, "little") + body
    with pytest.raises(ValueError, match="cannot hold"):
        decode_codes(data)
    body = bytes([1, 1, 1, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F])
    with pytest.raises(ValueError, match="more than"):
        decode_codes(b"PGC1S" + zlib.crc32(body).to_bytes(4, "little") + body)


@pytest.mark.parametrize("mode", MODES)
def test_a_few_bytes_cannot_ask_for_much(mode: str) -> None:
    """Columns without rows, many little groups, large constant matrices: refused before anything is allocated."""

    def varints(*numbers: int) -> bytes:
        return b"".join(_varint(number) for number in numbers)

    for body, message in (
        (varints(1, 0, 1 << 40, 1), "cannot hold"),
        (varints(1, 1 << 40, 0, 1), "cannot hold"),
        (varints(1, 1 << 12, 1 << 11, 1), "cannot hold"),
        (varints(1, 1, 1, 4097), "more than 4096"),
        (varints(3000, *(n for i in range(3000) for n in (1, 1 + i % 2, 2))), "more than 4096"),
    ):
        data = (b"PGC1S" if mode == "static" else b"PGC1C") + zlib.crc32(body).to_bytes(4, "little") + body
        for decode in (decode_codes, decode_static) if mode == "static" else (decode_codes,):
            with pytest.raises(ValueError, match=message if decode is decode_codes else "coded matrices"):
                decode(data)
    with pytest.raises(ValueError, match="would stand for all of them"):
        encode_codes([np.zeros((1 << 12, 1 << 11), np.int8)], mode=mode)
    with pytest.raises(ValueError, match="wanted at most 4096"):
        encode_codes([np.zeros((1, 1), np.int8)] * 4097, mode=mode)


def test_what_goes_wrong_in_a_group_of_its_own_thread_is_an_exception() -> None:
    addresses = [(0, 0, 1 << 60)]  # no rows of more columns than there is memory for
    with pytest.raises((MemoryError, ValueError)):
        _native.decode_context(bytes([0, 0, 64, 0]), addresses, 2)


def test_predicted_rows_of_several_matrices_are_counted_together() -> None:
    draw = np.random.default_rng(8)
    tall = [(draw.normal(0, 6, (35000, 1)) + draw.normal(0, 2, (35000, 2))).round().astype(np.int8) for _ in range(2)]
    for matrices in (tall, tall[:1]):
        for got, wanted in zip(decode_codes(encode_codes(matrices, mode="context")), matrices, strict=True):
            assert np.array_equal(got, wanted)


def test_what_encode_codes_refuses() -> None:
    with pytest.raises(TypeError, match=r"matrices\[1\]: got int16, wanted int8"):
        encode_codes([np.zeros((2, 2), np.int8), np.zeros((2, 2), np.int16)])
    with pytest.raises(ValueError, match=r"matrices\[0\]: got shape \(3,\)"):
        encode_codes([np.zeros(3, np.int8)])
    with pytest.raises(ValueError, match="mode: got 'best'"):
        encode_codes([], mode="best")
    with pytest.raises(ValueError, match="threads: got 0"):
        encode_codes([], threads=0)


@pytest.mark.parametrize("name", CASES)
def test_the_numpy_decoder_of_the_static_format(name: str) -> None:
    for got, wanted in zip(decode_static(encode_codes(CASES[name])), CASES[name], strict=True):
        assert got.dtype == np.int8 and np.array_equal(got, wanted)


def _frozen() -> list[np.ndarray]:
    """Matrices made without a random generator, so that they stay the same whatever NumPy does."""
    waves = [(6 * np.sin(np.outer(np.arange(1, 41) ** 1.5, np.arange(1, 9) + shift))).round() for shift in (0, 0.5)]
    ramp = np.arange(150).reshape(150, 1) * 37 % 251 - 120
    tall = np.outer(np.arange(70) * 29 % 13 - 6, [1, 2, 3, 4]) + np.arange(280).reshape(70, 4) * 17 % 5
    return [m.astype(np.int8) for m in (*waves, ramp, tall)]


def test_bytes_of_the_first_release_are_read_for_ever() -> None:
    for mode, text in FIRST_RELEASE.items():
        for got, wanted in zip(decode_codes(base64.b85decode(text)), _frozen(), strict=True):
            assert np.array_equal(got, wanted), mode
    assert encode_codes(_frozen(), mode="context") == base64.b85decode(FIRST_RELEASE["context"])
