-- Macros that the views use; made before them. Names that begin with an underscore are not for users.

-- The double nearest to (high * 2^64 + low) / 2^bits: through text, because text to double rounds once.
-- `high` has the sign (two's complement), so sums of parts are summed apart.
CREATE MACRO _fixed(high, low, bits) AS
    (high::HUGEINT * 18446744073709551616::HUGEINT + low::HUGEINT)::VARCHAR::DOUBLE / pow(2, bits);

-- Of the highest and the lowest of some numbers the one further from 0; of equals the positive.
CREATE MACRO _furthest(highest, lowest) AS CASE WHEN -lowest > highest THEN lowest ELSE highest END;

-- The 193 inner edges of the histogram's 194 bins: 8 an octave from 2^-10 to 2^14.
CREATE MACRO histogram_edges() AS list_transform(range(193), lambda i: pow(2, -10 + i / 8));

-- A bin's geometric middle, never above the maximum (in absolute value); the open bins give their edge.
CREATE MACRO _bin_value(bin, highest) AS least(
    highest::DOUBLE,
    CASE WHEN bin = 0 THEN pow(2, -10) WHEN bin = 193 THEN highest::DOUBLE ELSE pow(2, -10 + (bin - 0.5) / 8) END
);

-- The steps of splitmix64's finaliser over UBIGINT: products of 64 bits fit UHUGEINT. (A macro of all steps
-- would name its argument eight times, and nested as needed 64 times: planning took 80 ms.)
CREATE MACRO _wrapped(x) AS (x & 18446744073709551615::UHUGEINT)::UBIGINT;
CREATE MACRO _times(x, y) AS x::UHUGEINT * y::UHUGEINT;
CREATE MACRO _mixed(x, bits, factor) AS _wrapped(_times(xor(x, x >> bits), factor));
