"""Right answers to the 13 questions of MT-Bench for which the published reference answer of GPT-4 is reported wrong.

Worked out for this project, in our own words; the report is lm-sys/FastChat#3158. A judge sees `turns` in place of the
published answer; `working` says how the answer was found and what is wrong with the other. Tests compute each of them,
and run each program.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Corrected:
    """The right answers to a question's two turns. working: how they were found."""

    turns: tuple[str, str]
    working: str


CORRECTED: dict[int, Corrected] = {
    104: Corrected(
        (
            "David has no brother. Each of his three sisters has one brother, and that brother is David himself.",
            "David has one brother. Each sister has two brothers: David and one other boy. That boy is David's only "
            "brother.",
        ),
        "A boy among b brothers and s sisters has b - 1 brothers, and each of his sisters has b. First b = 1, so David "
        "has 0; then b = 2, so he has 1. The published answers give David as many brothers as his sisters have.",
    ),
    105: Corrected(
        (
            "The secretary is Alice.\n\n"
            "Number the spaces 1 (CEO), 2 (president), 3 (vice president), 4 (secretary), 5 (treasurer).\n"
            "1. Space 1 has the red car, and space 5 the purple car, which is David's.\n"
            "2. The secretary's car, in space 4, is yellow.\n"
            "3. Blue is between red and green, so space 2 is blue and space 3 is green. The green car is Enid's.\n"
            "4. Alice is next to David, so she is in space 4: she is the secretary.\n"
            "5. Bert is between Cheryl and Enid, so Bert is in space 2 and Cheryl in space 1.",
            "Purple, yellow, green, blue, red.",
        ),
        "Of the 120 orders of colours and 120 orders of people, exactly one of each fulfils all conditions: red, blue, "
        "green, yellow, purple, and Cheryl, Bert, Enid, Alice, David. The published answer names Cheryl as the "
        "secretary, and puts Alice next to David in a space that is not next to his.",
    ),
    109: Corrected(
        (
            "The shadow points to the west. In the morning the sun is in the east, and a shadow points away from the "
            "sun.",
            "Suresh was facing south. The shadow points to the west and falls to his right, so his right is the west. "
            "Whoever has the west on the right looks to the south.",
        ),
        "To the right of a person who looks north, east, south or west is the east, south, west or north. Only the "
        "south has the west on its right. The published answer says north, which has the east there.",
    ),
    111: Corrected(
        (
            "The area is 3.\n\n"
            "With the vertices A = (0, 0), B = (-1, 1) and C = (3, 3), the area is half the absolute value of the "
            "cross product of AB and AC: |(-1) * 3 - 1 * 3| / 2 = |-6| / 2 = 3.",
            "The area of the circumscribed circle is 5 * pi, about 15.71.\n\n"
            "The angle at (0, 0) is a right angle, because (-1) * 3 + 1 * 3 = 0. So the side from (-1, 1) to (3, 3) is "
            "a diameter of the circle. Its length is sqrt(4^2 + 2^2) = sqrt(20), the radius is sqrt(20) / 2 = sqrt(5), "
            "and the area is pi * 5.",
        ),
        "The centre is (1, 2), the middle of the longest side: its squared distance to each vertex is 1 + 4 = 5, "
        "4 + 1 = 5 and 4 + 1 = 5. The published answer multiplies wrongly, gets the area 0 and denies the circle.",
    ),
    113: Corrected(
        (
            "The probability is 19 %.\n\n"
            "Blue or green is liked by 58 % + 45 % - 22 % = 81 % of the students, since those who like both are "
            "counted twice. The others, 100 % - 81 % = 19 %, like neither.",
            "The probability is 0. A student who likes green does not dislike green, so none of them dislikes both "
            "colors.",
        ),
        "In percent of all students: 36 like only blue, 23 only green, 22 both, 19 neither. Of the 45 who like green, "
        "none is among the 19. The published answer to the second turn answers another question: what share of them "
        "dislikes blue.",
    ),
    114: Corrected(
        (
            "The probability is 35/36, about 97.2 %.\n\n"
            "There are 6 * 6 = 36 equally likely outcomes. The total is below 3 only for (1, 1), whose total is 2. So "
            "36 - 1 = 35 outcomes have a total of at least 3.",
            "The probability is 1 (100 %).\n\n"
            "Only (1, 1) has a total that is not at least 3, and that total, 2, is even. So every outcome has a total "
            "that is even or at least 3.",
        ),
        "Counted over the 36 outcomes: 35 and 36. The published answer counts (1, 2) and (2, 1) as totals of 2.",
    ),
    120: Corrected(
        (
            "f(2) = 4 * 2^3 - 9 * 2 - 14 = 32 - 18 - 14 = 0.",
            "x = 2, which the previous answer has shown: f(2) = 0. It is the only real solution.\n\n"
            "Dividing by (x - 2) gives f(x) = (x - 2)(4x^2 + 8x + 7). The quadratic has the discriminant "
            "8^2 - 4 * 4 * 7 = -48, which is negative, so it has no real root. Its complex roots are "
            "x = -1 + (sqrt(3) / 2) i and x = -1 - (sqrt(3) / 2) i.",
        ),
        "(x - 2)(4x^2 + 8x + 7) = 4x^3 + 8x^2 + 7x - 8x^2 - 16x - 14 = 4x^3 - 9x - 14. The published answer does not "
        "see that its first turn holds the solution, and ends with 1.65, where f is not 0 but about -10.9.",
    ),
    122: Corrected(
        (
            "With F(0) = 0, F(1) = 1 and F(n) = F(n - 1) + F(n - 2):\n\n"
            "```cpp\n"
            "#include <iostream>\n\n"
            "long long fibonacci(int n) {\n"
            "    if (n < 2) {\n"
            "        return n;\n"
            "    }\n"
            "    return fibonacci(n - 1) + fibonacci(n - 2);\n"
            "}\n\n"
            "int main() {\n"
            "    int n;\n"
            "    if (!(std::cin >> n) || n < 0) {\n"
            '        std::cerr << "give a whole number that is not negative\\n";\n'
            "        return 1;\n"
            "    }\n"
            "    std::cout << fibonacci(n) << '\\n';\n"
            "}\n"
            "```\n\n"
            "The recursion takes exponential time, so it is for small n only.",
            "Counted from 1, the sequence is 0, -1, -1, -2, -4, -7, -13, -24, ... The first three numbers need a case "
            "of their own:\n\n"
            "```cpp\n"
            "#include <iostream>\n\n"
            "long long number(int n) {\n"
            "    long long a = 0, b = -1, c = -1;  // three numbers in a row, at first those with n = 1, 2, 3\n"
            "    for (int i = 1; i < n; ++i) {\n"
            "        long long next = a + b + c;\n"
            "        a = b;\n"
            "        b = c;\n"
            "        c = next;\n"
            "    }\n"
            "    return a;\n"
            "}\n\n"
            "int main() {\n"
            "    int n;\n"
            "    if (!(std::cin >> n) || n < 1) {\n"
            '        std::cerr << "give a whole number from 1 on\\n";\n'
            "        return 1;\n"
            "    }\n"
            "    std::cout << number(n) << '\\n';\n"
            "}\n"
            "```\n\n"
            "It takes n steps and constant memory. Counted from 0, call number(n + 1).",
        ),
        "0 - 1 - 1 = -2, -1 - 1 - 2 = -4, -1 - 2 - 4 = -7, -2 - 4 - 7 = -13, -4 - 7 - 13 = -24. Both programs were "
        "compiled and compared with these. The published program of the second turn reads outside of its vector for "
        "n below 1, and does not say from where it counts.",
    ),
    124: Corrected(
        (
            "There is no bug. The table has a row and a column more than the strings have characters; they are 0, the "
            "length for an empty string. Each other entry follows from its neighbours: one more than the diagonal one "
            "if the characters are equal, else the larger of the upper and the left one. The result is the last entry. "
            "Time and memory are O(m * n).",
            "This one has a bug: the table begins as None, and its first row and column are never set. If both strings "
            "have characters, the first step computes None + 1, or compares None with None, and raises a TypeError; if "
            "one of them is empty, the result is None and not 0. The table has to begin as 0:\n\n"
            "```python\n"
            "def longest_common_subsequence(X, Y):\n"
            "    m, n = len(X), len(Y)\n"
            "    dp = [[0] * (n + 1) for _ in range(m + 1)]\n"
            "    for i in range(1, m + 1):\n"
            "        for j in range(1, n + 1):\n"
            "            if X[i - 1] == Y[j - 1]:\n"
            "                dp[i][j] = dp[i - 1][j - 1] + 1\n"
            "            else:\n"
            "                dp[i][j] = max(dp[i - 1][j], dp[i][j - 1])\n"
            "    return dp[m][n]\n"
            "```",
        ),
        "Both functions of the question were run on all strings over two letters of up to five characters: the first "
        "agrees with trying all subsequences, the second raises TypeError or returns None. The published answer to the "
        "second turn calls the function correct before it names the bug, and calls it a small issue.",
    ),
    125: Corrected(
        (
            "The root. It is an ancestor of every other node, and nothing is above it. So the function needs no "
            "search:\n\n"
            "```python\n"
            "def highest_common_ancestor(root, first, second):\n"
            "    return root\n"
            "```\n\n"
            "This takes both nodes to be in the tree, and a node to be an ancestor of itself. (If it is not, there is "
            "no common ancestor when one of the two is the root.)",
            "It is still the root. In every rooted tree, whatever the number of children, the root is above all other "
            "nodes, so the same function is right.",
        ),
        "Of the common ancestors of two nodes, which all are on the way from the lowest one to the root, the highest "
        "is the root itself. The published answers compute the lowest one, which the question excludes.",
    ),
    126: Corrected(
        (
            "Walk through both arrays as if they were merged, up to the middle, and keep only the last two values. "
            "This takes O(m + n) time, and O(1) space, since nothing is merged:\n\n"
            "```python\n"
            "def find_median(first, second):\n"
            "    total = len(first) + len(second)\n"
            "    if total == 0:\n"
            '        raise ValueError("no numbers, no median")\n'
            "    i = j = 0\n"
            "    before = last = None\n"
            "    for _ in range(total // 2 + 1):\n"
            "        before = last\n"
            "        if j == len(second) or (i < len(first) and first[i] <= second[j]):\n"
            "            last = first[i]\n"
            "            i += 1\n"
            "        else:\n"
            "            last = second[j]\n"
            "            j += 1\n"
            "    return last if total % 2 else (before + last) / 2\n"
            "```",
            "Yes: a binary search for the place where the shorter array is cut, in O(log(min(m, n))) time and O(1) "
            "space. The cut of the longer array follows, because half of all numbers have to be on the left. The cut "
            "is right if nothing on the left is larger than anything on the right:\n\n"
            "```python\n"
            "def find_median(first, second):\n"
            "    if len(first) > len(second):\n"
            "        first, second = second, first\n"
            "    m, n = len(first), len(second)\n"
            "    if n == 0:\n"
            '        raise ValueError("no numbers, no median")\n'
            '    infinity = float("inf")\n'
            "    low, high = 0, m\n"
            "    while True:\n"
            "        i = (low + high) // 2\n"
            "        j = (m + n + 1) // 2 - i\n"
            "        left_1 = first[i - 1] if i > 0 else -infinity\n"
            "        right_1 = first[i] if i < m else infinity\n"
            "        left_2 = second[j - 1] if j > 0 else -infinity\n"
            "        right_2 = second[j] if j < n else infinity\n"
            "        if left_1 > right_2:\n"
            "            high = i - 1\n"
            "        elif left_2 > right_1:\n"
            "            low = i + 1\n"
            "        elif (m + n) % 2:\n"
            "            return max(left_1, left_2)\n"
            "        else:\n"
            "            return (max(left_1, left_2) + min(right_1, right_2)) / 2\n"
            "```",
        ),
        "Both programs were compared with sorting on random arrays of 0 to 7 numbers. The published answer says that "
        "the task of the first turn is impossible, and so has nothing better to offer in the second.",
    ),
    128: Corrected(
        (
            "B_1 = 1. A larger full binary tree is a root with two full binary trees, which share the other n - 1 "
            "vertices: B_n is the sum of B_i * B_(n-1-i) over i = 1, ..., n - 2. For even n, B_n = 0.\n\n"
            "```python\n"
            "def full_binary_trees(n):\n"
            "    if n < 1 or n % 2 == 0:\n"
            "        return 0\n"
            "    counts = [0] * (n + 1)\n"
            "    counts[1] = 1\n"
            "    for size in range(3, n + 1, 2):\n"
            "        for left in range(1, size - 1, 2):\n"
            "            counts[size] += counts[left] * counts[size - 1 - left]\n"
            "    return counts[n]\n"
            "```\n\n"
            "B_1, B_3, B_5, B_7, B_9 are 1, 1, 2, 5, 14: Catalan numbers. It takes O(n^2) time.",
            "Every vertex has zero or three children. T_1 = 1, and T_n is the sum of T_i * T_j * T_k over all positive "
            "i, j, k with i + j + k = n - 1. Each vertex with children adds three vertices, so T_n = 0 unless n leaves "
            "the remainder 1 when divided by 3.\n\n"
            "```python\n"
            "def full_ternary_trees(n):\n"
            "    if n < 1 or n % 3 != 1:\n"
            "        return 0\n"
            "    counts = [0] * (n + 1)\n"
            "    counts[1] = 1\n"
            "    for size in range(4, n + 1, 3):\n"
            "        for left in range(1, size - 2, 3):\n"
            "            for middle in range(1, size - 1 - left, 3):\n"
            "                right = size - 1 - left - middle\n"
            "                counts[size] += counts[left] * counts[middle] * counts[right]\n"
            "    return counts[n]\n"
            "```\n\n"
            "T_1, T_4, T_7, T_10, T_13 are 1, 1, 3, 12, 55: not Catalan numbers. It takes O(n^3) time.",
        ),
        "With k vertices that have children there are binomial(2k, k) / (k + 1) binary trees (n = 2k + 1), and "
        "binomial(3k, k) / (2k + 1) ternary ones (n = 3k + 1); the programs agree with both formulas up to k = 12. The "
        "published programs begin their sums at 0, which gives 0 for every n above 1, and the second one refuses "
        "n = 4.",
    ),
    130: Corrected(
        (
            "Compare each element of the first array with those of the second. An element that occurred earlier in the "
            "first array is passed over, so each common element is printed once:\n\n"
            "```python\n"
            "def print_common_elements(first, second):\n"
            "    for i in range(len(first)):\n"
            "        seen = False\n"
            "        for k in range(i):\n"
            "            if first[k] == first[i]:\n"
            "                seen = True\n"
            "                break\n"
            "        if seen:\n"
            "            continue\n"
            "        for other in second:\n"
            "            if other == first[i]:\n"
            "                print(first[i])\n"
            "                break\n"
            "```\n\n"
            "No other data structure is used; it takes O(m * (m + n)) time. If the arrays may be reordered, sorting "
            "them in place and walking through both at once takes O(m log m + n log n).",
            "With hash sets it takes O(m + n) time on average, which cannot be better, since every element has to be "
            "looked at:\n\n"
            "```python\n"
            "def common_elements(first, second):\n"
            "    return set(first) & set(second)\n"
            "```",
        ),
        "Compared with counting on random arrays with repetitions. The published programs print an element again for "
        "each repetition: [1, 1] and [1, 1] give 1 four times, and twice with the set.",
    ),
}
